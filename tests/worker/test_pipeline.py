"""Workers of several ranks in processes of their own against one worker alone: the same tokens, whatever the steps."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from shoal.config.engine_config import EngineConfig
from shoal.config.parallel import ParallelConfig
from shoal.config.resolve import make_engine_config
from shoal.distributed.shared_memory import Layout
from shoal.messages import BatchResult, ScheduledBatch, SlotAssignment, SlotWork
from shoal.types import SamplingParams
from shoal.worker.worker import Worker
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.worker.random_schedule import RandomSchedule, Request
from tests.worker.ranks import Ranks

NUM_SLOTS = 6
NUM_BLOCKS = 60
MAX_TOKENS = 48


def make_config(path: Path, tensor_size: int, pipeline_size: int, **options: object) -> EngineConfig:
    values: dict = dict(model=str(path), dtype="float32", device="cpu", max_model_len=128, max_num_seqs=NUM_SLOTS)
    values |= dict(num_gpu_blocks_override=NUM_BLOCKS, max_num_batched_tokens=MAX_TOKENS, deterministic=True)
    config = make_engine_config(**(values | options))
    parallel = ParallelConfig(tensor_size=tensor_size, pipeline_size=pipeline_size, backend="mp")
    return dataclasses.replace(config, parallel=parallel)


SAMPLING = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 3},
    {"temperature": 0.7, "seed": 6, "top_k": 20, "min_tokens": 1, "stop_token_ids": [7, 8, 9]},
    {"temperature": 0.0, "prompt_logprobs": 2},
    {"temperature": 1.3, "seed": 7, "logit_bias": {3: 4.0, 5: -2.0}},
]


def make_requests(seed: int, count: int = 14) -> list[Request]:
    generator = random.Random(seed)
    requests = []
    for index in range(count):
        max_tokens = generator.choice([1, 2, 5, 9])
        prompt = [generator.randrange(VOCAB_SIZE) for _ in range(generator.choice([1, 2, 15, 17, 40, 100]))]
        sampling = SamplingParams(**SAMPLING[index % len(SAMPLING)], max_tokens=max_tokens, ignore_eos=True)  # type: ignore[arg-type]
        requests.append(Request(prompt, sampling, generator.randint(1, max_tokens)))
    return requests


class Alone:
    """One worker in this process, with the face of `Ranks`."""

    def __init__(self, config: EngineConfig) -> None:
        self.worker = Worker(config)
        num_blocks, self.facts = self.worker.load(lambda _: None)
        self.worker.allocate(num_blocks, lambda _: None)
        self._collect: list[Callable[[], BatchResult]] = []

    def step(self, batch: ScheduledBatch, sleeps: object = None) -> None:
        self.worker.execute(batch)
        self._collect.append(self.worker.sample(batch.step_id))

    def result(self) -> BatchResult:
        return self._collect.pop(0)()


def serve(
    ranks: Ranks | Alone, requests: list[Request], *, in_flight: int, seed: int, sleeps: dict[int, float] | None = None
) -> list[Request]:
    """Serve them to their ends; batches are numbered from 0, so a worker serves once."""
    schedule = RandomSchedule(
        requests, num_slots=NUM_SLOTS, num_blocks=NUM_BLOCKS, block_size=16, max_tokens=MAX_TOKENS, seed=seed
    )
    while True:
        batch = schedule.next_batch()
        if batch is not None:
            ranks.step(batch, sleeps)
        elif not schedule.num_in_flight:
            break
        if batch is None or schedule.num_in_flight >= in_flight:
            schedule.take(ranks.result())
    assert all(request.ended for request in requests)
    return requests


def compare(requests: list[Request], expected: list[Request]) -> None:
    for one, other in zip(requests, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs and one.prompt_logprobs == other.prompt_logprobs
        assert bool(one.logprobs) == (one.sampling.logprobs is not None)
        assert len(one.prompt_logprobs) == (len(one.prompt) - 1 if one.sampling.prompt_logprobs is not None else 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen2", num_hidden_layers=5)


@pytest.fixture(scope="module")
def three_stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(tmp_path_factory.mktemp("ranks"), pipeline_size=3) as ranks:
        yield ranks


def check_stages(checkpoint: Path, ranks: Ranks) -> None:
    num_stages = ranks.pipeline_size
    busy = [report.busy_seconds for report in ranks.idle()] if ranks.is_loaded else [0.0] * num_stages
    # How many steps are in flight, and which stage is slow.
    runs = [(1, None), (num_stages, 0), (num_stages + 1, num_stages - 1), (9, 1)]
    for seed, (in_flight, slow) in enumerate(runs):
        expected = serve(Alone(make_config(checkpoint, 1, 1)), make_requests(seed), in_flight=1, seed=seed)
        ranks.load(make_config(checkpoint, 1, num_stages))
        sleeps = {} if slow is None else {slow: 0.005}
        requests = serve(ranks, make_requests(seed), in_flight=in_flight, seed=seed + 100, sleeps=sleeps)
        compare(requests, expected)
        reports = ranks.idle()
        busy = [before + report.stage_times["busy"] for before, report in zip(busy, reports, strict=True)]
        assert all(seconds > 0 for seconds in busy) and busy == pytest.approx([each.busy_seconds for each in reports])


def test_stages_give_the_tokens_of_one_rank(checkpoint: Path, three_stages: Ranks) -> None:
    check_stages(checkpoint, three_stages)


@pytest.mark.slow
@pytest.mark.parametrize("num_stages", [2, 4, 5])
def test_other_numbers_of_stages(checkpoint: Path, tmp_path: Path, num_stages: int) -> None:
    with Ranks(tmp_path, pipeline_size=num_stages) as ranks:
        check_stages(checkpoint, ranks)


def test_stages_and_tensor_ranks_give_the_tokens_of_one_rank(checkpoint: Path, tmp_path: Path) -> None:
    """The second model's hidden states cannot be cut in two, so that every rank sends all of them."""
    odd = make_checkpoint(tmp_path / "odd", "qwen2", num_hidden_layers=3, hidden_size=61, head_dim=16)
    with Ranks(tmp_path, tensor_size=2, pipeline_size=2) as ranks:
        for path in (checkpoint, odd):
            expected = serve(Alone(make_config(path, 1, 1)), make_requests(9), in_flight=1, seed=9)
            ranks.load(make_config(path, 2, 2))
            compare(serve(ranks, make_requests(9), in_flight=3, seed=109), expected)
            ranks.idle()
        ranks.kill(1)
        with pytest.raises(AssertionError, match=r"rank 1 .*ended before it came"):
            ranks.idle()


def test_hidden_states_larger_than_what_the_stages_share(tmp_path: Path, three_stages: Ranks) -> None:
    """Twice the memory that two ranks share for sending: once with nothing after it, then several while a stage is
    slow."""
    shape = {"hidden_size": 2048, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    path = make_checkpoint(
        tmp_path / "wide", "llama", head_dim=16, num_hidden_layers=3, max_position_embeddings=4096, **shape
    )
    length = 2 * Layout(num_ranks=3).channel_bytes // (4 * 2048) + 5
    options: dict = {"max_model_len": 4096, "max_num_batched_tokens": 4096, "deterministic": False}
    options |= {"num_gpu_blocks_override": 600, "load_format": "dummy"}
    num_blocks = -(-(length + 1) // 16)
    batches = []
    for slot in range(3):
        ids = [(slot + index) % VOCAB_SIZE for index in range(length)]
        assignment = SlotAssignment(slot, "", ids, length, SamplingParams(temperature=0.0))
        blocks = list(range(1 + slot * num_blocks, 1 + (slot + 1) * num_blocks))
        batches.append(ScheduledBatch(slot, 0, [], [assignment], [SlotWork(slot, 0, length, blocks, True)]))
    batches.append(ScheduledBatch(3, 0, [], [], [SlotWork(slot, length, 1, [], True) for slot in range(3)]))

    alone = Alone(make_config(path, 1, 1, **options))
    three_stages.load(make_config(path, 1, 3, **options))
    for some in (batches[:1], batches[1:]):
        for batch in some:
            three_stages.step(batch, {1: 0.05})
        for batch in some:
            alone.step(batch)
            assert three_stages.result() == alone.result()
    three_stages.idle()


@pytest.mark.multigpu
@pytest.mark.parametrize(("tensor_size", "pipeline_size"), [(1, 2), (1, 4), (2, 2)])
def test_stages_over_nccl(checkpoint: Path, tmp_path: Path, tensor_size: int, pipeline_size: int) -> None:
    """On GPUs numbers depend on who else is in a step, in their last bits; tokens of such a model do not."""
    if torch.cuda.device_count() < tensor_size * pipeline_size:
        pytest.skip(f"needs {tensor_size * pipeline_size} CUDA GPUs")
    options: dict = {"device": "cuda", "deterministic": False}
    with Ranks(tmp_path, tensor_size=tensor_size, pipeline_size=pipeline_size, device="cuda") as ranks:
        for seed, in_flight in enumerate((1, pipeline_size, pipeline_size + 1, 9)):
            alone = Alone(make_config(checkpoint, 1, 1, **options))
            expected = serve(alone, make_requests(seed), in_flight=1, seed=seed)
            ranks.load(make_config(checkpoint, tensor_size, pipeline_size, **options))
            requests = serve(ranks, make_requests(seed), in_flight=in_flight, seed=seed + 100)
            assert [each.token_ids for each in requests] == [each.token_ids for each in expected]
            assert all(report.stage_times["busy"] > 0 for report in ranks.idle())
