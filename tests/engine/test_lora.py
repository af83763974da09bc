"""LoRA in a whole engine core, on a CPU and on a GPU: many adapters in a step, others loaded while requests decode,
short floats, quantized weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.config.lora import digest_adapter
from shoal.messages import AddRequest, CoreMessage, CoreOutputs
from shoal.types import EngineRequest, SamplingParams
from shoal.types.adapter import AdapterRef
from shoal.worker.worker import Worker
from tests.adapters import ALL_LINEAR, make_adapter, merge
from tests.checkpoints import make_checkpoint
from tests.engine.local_engine import Answer, run_engine
from tests.engine.simulated_executor import InMemoryChannel
from tests.engine.test_parallel import check_equal, make_config
from tests.models.paged import random_tokens
from tests.quantization import test_byte_checkpoints, test_gptq_awq_checkpoints
from tests.quantization.writers import write_quantized

ON_A_GPU = pytest.mark.gpu
RANKS = (1, 2, 3, 4, 8, 16, 5, 12)
TARGETS = (ALL_LINEAR, ("q_proj", "v_proj"), ("k_proj", "o_proj", "down_proj"))
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "tie_word_embeddings": False,
}


class Adapted:
    """A checkpoint in fp32, adapters of different ranks and targets, and the checkpoints that they are merged into."""

    def __init__(self, root: Path, path: Path, num_adapters: int) -> None:
        self.path, self._root = path, root
        self.adapters = [
            make_adapter(root / f"adapter-{seed}", path, seed=seed, rank=RANKS[seed], targets=TARGETS[seed % 3])
            for seed in range(num_adapters)
        ]

    def refer(self, index: int | None, slot: int | None = None, uid: str = "") -> AdapterRef | None:
        if index is None:
            return None
        path = str(self.adapters[index])
        return AdapterRef(index if slot is None else slot, uid or f"adapter-{index}", path, digest_adapter(path))

    def merged(self, index: int | None) -> Path:
        if index is None:
            return self.path
        directory = self._root / f"merged-{index}"
        return directory if directory.exists() else merge(directory, self.path, self.adapters[index])

    def expected(self, requests: dict[int | None, list[EngineRequest]], **options: Any) -> dict[str, Answer]:
        """What a CPU answers to requests without adapters, by the adapter that is merged into the weights."""
        answers: dict[str, Answer] = {}
        for index, own in requests.items():
            answers |= run_engine(make_config(str(self.merged(index)), **options), own)[0]
        return answers


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    root = tmp_path_factory.mktemp("llama")
    return Adapted(root, make_checkpoint(root / "model", "llama", **SIZES), len(RANKS))


def greedy(request_id: str, prompt: list[int], max_tokens: int, logprobs: int | None = None) -> EngineRequest:
    parameters = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=logprobs)
    return EngineRequest(request_id, prompt, parameters)


def with_adapter(request: EngineRequest, adapter: AdapterRef | None) -> EngineRequest:
    return EngineRequest(request.request_id, request.prompt_token_ids, request.sampling, adapter=adapter)


def checks_graphs(device: str, enforce_eager: bool) -> Callable[[Worker], None]:
    def check(worker: Worker) -> None:
        assert (worker.runner.graphs is not None) == (device == "cuda" and not enforce_eager)

    return check


@pytest.mark.parametrize(
    ("device", "enforce_eager"),
    [("cpu", False), pytest.param("cuda", False, marks=ON_A_GPU), pytest.param("cuda", True, marks=ON_A_GPU)],
)
def test_eight_adapters_and_none_in_one_batch(llama: Adapted, device: str, enforce_eager: bool) -> None:
    """Prompts in pieces, preempted requests, tokens chosen in graphs and out of them."""
    indices: list[int | None] = [*range(len(RANKS)), None]
    requests: dict[int | None, list[EngineRequest]] = {
        index: [
            greedy(f"{index}-{turn}", random_tokens(length, seed=number), 12, None if turn else 2)
            for turn, length in enumerate((7 + 11 * number, 70 - 7 * number))
        ]
        for number, index in enumerate(indices)
    }
    turns = [[with_adapter(requests[index][turn], llama.refer(index)) for index in indices] for turn in range(2)]
    options = {"device": device, "enforce_eager": enforce_eager, "num_gpu_blocks_override": 24}
    config = make_config(str(llama.path), enable_lora=True, **options)
    answers, stats = run_engine(config, turns[0] + turns[1], after_start=checks_graphs(device, enforce_eager))
    assert stats.num_preemptions_total > 0
    check_equal(answers, llama.expected(requests), bits=False)


class OneAfterTheOther(InMemoryChannel):
    """Gives a request when the one before it has ended, while others go on. ended: ids, in their order."""

    def __init__(self, requests: Iterable[EngineRequest]) -> None:
        super().__init__()
        self.ended: list[str] = []
        self._waiting = list(requests)
        self._last: str | None = None

    def receive(self, block: bool, seconds: float | None = None) -> list[Any]:
        if self._waiting and (self._last is None or self._last in self.ended):
            self._last = self._waiting[0].request_id
            self.push(AddRequest(self._waiting.pop(0)))
        return super().receive(block)

    def send(self, message: CoreMessage) -> None:
        super().send(message)
        if isinstance(message, CoreOutputs):
            self.ended += [delta.request_id for delta in message.deltas if delta.finish_reason is not None]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def test_adapters_take_a_place_one_after_the_other_while_others_decode(llama: Adapted, device: str) -> None:
    """Two places: one adapter decodes all along in the first, and a request without any; the second is filled anew for
    each request, at last with one that was there before."""
    order = [1, 2, 3, 4, 5, 6, 7, 1]
    turns = [greedy(f"turn-{turn}", random_tokens(9 + turn, seed=turn), 6) for turn in range(len(order))]
    long, plain = (greedy(name, random_tokens(20, seed=50), count) for name, count in (("long", 130), ("plain", 150)))
    requests: dict[int | None, list[EngineRequest]] = {0: [long], None: [plain]}
    for index, request in zip(order, turns, strict=True):
        requests.setdefault(index, []).append(request)
    channel = OneAfterTheOther(
        with_adapter(request, llama.refer(index, 1, f"uid-{turn}"))
        for turn, (index, request) in enumerate(zip(order, turns, strict=True))
    )
    config = make_config(str(llama.path), device=device, enable_lora=True, max_loras=2)
    first = [with_adapter(long, llama.refer(0, 0)), plain]
    answers, _ = run_engine(config, first, after_start=checks_graphs(device, False), channel=channel)
    assert channel.ended == [request.request_id for request in (*turns, long, plain)]
    check_equal(answers, llama.expected(requests), bits=False)


# --- rounding ----------------------------------------------------------------------------------------------------


def forced(index: int | None, number: int) -> list[EngineRequest]:
    """Their tokens are given, so that the log-probabilities of two runs are of the same texts."""
    requests = []
    for turn in range(3):
        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=30,
            ignore_eos=True,
            logit_bias={20 + number: 100.0},
            logprobs=0,
            prompt_logprobs=0 if turn else None,
        )
        prompt = random_tokens(90 if turn else 40, seed=10 * number + turn)
        requests.append(EngineRequest(f"forced-{index}-{turn}", prompt, parameters))
    return requests


def logprobs_of(answers: dict[str, Answer]) -> torch.Tensor:
    found: list[float] = []
    for request_id in sorted(answers):
        entries = [entry for entry in answers[request_id].prompt_logprobs or [] if entry is not None]
        found += [entry.logprobs[0] for entry in entries + answers[request_id].logprobs]
    return torch.tensor(found)


class Rounded:
    """Log-probabilities of forced texts: in fp32, and on a CPU with all weights, the merged ones, in bf16.

    size: the mean of the latter's errors. An adapter beside the weights rounds its own products too, so that errors are
    1.0 to 1.3 times as large (a CPU in bf16, several seeds)."""

    def __init__(self, adapted: Adapted) -> None:
        self._adapted = adapted
        self._indices: list[int | None] = [*range(len(adapted.adapters)), None]
        own = {index: forced(index, number) for number, index in enumerate(self._indices)}
        self._exact = logprobs_of(adapted.expected(own))
        self.size = float((logprobs_of(adapted.expected(own, dtype="bfloat16")) - self._exact).abs().mean())

    def errors(self, path: Path, **options: Any) -> torch.Tensor:
        """Of a checkpoint with all its adapters beside it."""
        config = make_config(str(path), enable_lora=True, **options)
        requests = [
            with_adapter(request, self._adapted.refer(index))
            for number, index in enumerate(self._indices)
            for request in forced(index, number)
        ]
        return (logprobs_of(run_engine(config, requests)[0]) - self._exact).abs()

    def check(self, path: Path, device: str) -> None:
        assert self.errors(path, device=device).max() < 1e-3
        assert 0 < self.errors(path, device=device, dtype="bfloat16").mean() < 1.5 * self.size


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def test_bf16_is_near(llama: Adapted, device: str) -> None:
    Rounded(llama).check(llama.path, device)


QUANTIZED = {
    "gptq": test_gptq_awq_checkpoints.FORMS["gptq-act-order-by-matrix"],
    "awq": test_gptq_awq_checkpoints.FORMS["awq"],
    "fp8": test_byte_checkpoints.FORMATS["naive-quantized"],
}


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def test_beside_quantized_weights(tmp_path: Path, device: str, name: str) -> None:
    """The dequantized weights with the adapter merged in."""
    plain = make_checkpoint(tmp_path / "plain", "llama", **SIZES)
    path = write_quantized(plain, tmp_path, *QUANTIZED[name])
    Rounded(Adapted(tmp_path, tmp_path / "reference", 3)).check(path, device)
