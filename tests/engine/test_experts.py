"""Mixtures of experts in an engine of several processes: the tokens of one rank, and the load of each expert."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from shoal.messages import ClientMessage, CoreOutputs
from shoal.types import EngineRequest, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine.local_engine import run_engine
from tests.engine.simulated_executor import InMemoryChannel
from tests.engine.test_parallel import VOCAB_SIZE, alone, check_equal, make_config, make_requests
from tests.quantization.integer_writers import awq, gptq
from tests.quantization.writers import Writer, fp8_by_block, write_quantized

WAYS = {
    "tp": {"tensor_parallel_size": 2},
    "pp": {"pipeline_parallel_size": 2},
    "ep": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
}
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"]
# Each family and each way once; tests/models/test_experts.py has all of them with ranks as threads.
QUICK = [("mixtral", "pp"), ("qwen2_moe", "tp"), ("qwen3_moe", "ep"), ("deepseek_v3", "tp"), ("gpt_oss", "pp")]
ALL = [
    pytest.param(family, way, marks=[] if (family, way) in QUICK else [pytest.mark.slow])
    for family in FAMILIES
    for way in WAYS
]

# Of quantized checkpoints config, writer, and what is plain: a GPU quantizes rows for FP8 layers that are no experts.
QUANTIZED: dict[str, tuple[dict[str, Any], Writer, tuple[str, ...]]] = {
    "fp8-block": (
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [64, 64],
            "modules_to_not_convert": ["self_attn"],
        },
        fp8_by_block(64, 64),
        ("self_attn",),
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
        gptq(group=128),
        (),
    ),
    "awq": ({"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}, awq(32), ()),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        family: str(
            make_checkpoint(tmp_path_factory.mktemp(family), family, num_hidden_layers=3, vocab_size=VOCAB_SIZE)
        )
        for family in FAMILIES
    }


@pytest.mark.parametrize(("family", "way"), ALL)
def test_ranks_give_the_tokens_of_one(models: dict[str, str], family: str, way: str) -> None:
    answers, _ = run_engine(make_config(models[family], **WAYS[way]), make_requests(VOCAB_SIZE))
    check_equal(answers, alone(models[family]), bits=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_deterministic_ranks_give_its_bits(models: dict[str, str], family: str) -> None:
    expected = alone(models[family], deterministic=True)
    for way in ("ep",) if family == "gpt_oss" else ("tp", "ep"):  # experts with biases are not split
        config = make_config(models[family], deterministic=True, **WAYS[way])
        answers, _ = run_engine(config, make_requests(VOCAB_SIZE))
        check_equal(answers, expected, bits=True)


def test_the_load_of_experts_is_counted(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token of a prompt and every one that is generated goes to three experts in each of three layers, but for
    those whose states nobody asks for: of a prompt the last one alone is computed to the end."""
    monkeypatch.setattr("shoal.worker.worker._USE_SECONDS", 0.0)
    parameters = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    requests = [EngineRequest("a", list(range(5, 35)), parameters)]
    _, stats = run_engine(make_config(models["qwen3_moe"]), requests, [EngineRequest("b", [1], parameters)])
    # The counts are read before each step: of the second request's four, the last is not in them. One token a request
    # is never computed.
    assert len(stats.expert_tokens_total) == 8
    assert sum(stats.expert_tokens_total) == ((30 + 3 + 1 + 2) * 2 + (1 + 3 + 1 + 2)) * 3


class _Idle(InMemoryChannel):
    """Lets the core wait as long as it likes, and ends it when it waits for messages only."""

    def receive(self, block: bool, seconds: float | None = None) -> list[ClientMessage]:
        if block and seconds is not None and not self.incoming:
            time.sleep(seconds)
            return []
        return super().receive(block)


@pytest.mark.parametrize("way", [None, "tp", "pp", "ep"])
def test_an_idle_engine_has_told_the_load_of_all_steps(models: dict[str, str], way: str | None) -> None:
    """Without a step after the last one; one token a request is never computed. In the last layer each piece of a
    prompt has one token."""
    parameters = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    channel = _Idle()
    config = make_config(models["qwen3_moe"], **(WAYS[way] if way else {}))
    run_engine(config, [EngineRequest("a", list(range(5, 35)), parameters)], channel=channel)
    stats = [message.stats for message in channel.sent if isinstance(message, CoreOutputs) and message.stats]
    num_pieces = 4 if way == "pp" else 1
    assert sum(stats[-1].expert_tokens_total) == ((30 + 3) * 2 + (num_pieces + 3)) * 3


@pytest.mark.gpu
def test_an_idle_gpu_has_told_the_load_of_all_steps(models: dict[str, str]) -> None:
    parameters = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    for enforce_eager in (False, True):
        channel = _Idle()
        requests = [[EngineRequest(name, list(range(5, 35)), parameters)] for name in "ab"]
        run_engine(
            make_config(models["qwen3_moe"], device="cuda", enforce_eager=enforce_eager), *requests, channel=channel
        )
        stats = [message.stats for message in channel.sent if isinstance(message, CoreOutputs) and message.stats]
        totals = [sum(each.expert_tokens_total) for each in stats]
        assert totals == sorted(totals)
        # The second prompt's first block is in the prefix cache. Rows that pad a graph are counted, too.
        expected = ((30 + 3 + 14 + 3) * 2 + (1 + 3 + 1 + 3)) * 3
        assert totals[-1] == expected if enforce_eager else totals[-1] >= expected


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_gives_the_tokens_of_a_cpu(models: dict[str, str], family: str) -> None:
    """In CUDA graphs and out of them."""
    expected = alone(models[family])
    for enforce_eager in (False, True):
        config = make_config(models[family], device="cuda", enforce_eager=enforce_eager)
        answers, _ = run_engine(config, make_requests(VOCAB_SIZE))
        check_equal(answers, expected, bits=False)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_so_does_one_that_quantizes_them(models: dict[str, str], quantization: str) -> None:
    expected = alone(models["qwen3_moe"], quantization=quantization)
    for enforce_eager in (False, True):
        config = make_config(models["qwen3_moe"], device="cuda", enforce_eager=enforce_eager, quantization=quantization)
        answers, _ = run_engine(config, make_requests(VOCAB_SIZE))
        check_equal(answers, expected, bits=False)


@pytest.mark.gpu
@pytest.mark.parametrize("form", QUANTIZED)
def test_a_gpu_gives_the_probabilities_of_quantized_experts(tmp_path: Path, form: str) -> None:
    """In half precision, in CUDA graphs and out of them."""
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "moe_intermediate_size": 128,
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": False,
    }
    plain = make_checkpoint(tmp_path / "plain", "qwen3_moe", **sizes)
    config, writer, kept = QUANTIZED[form]
    path = str(write_quantized(plain, tmp_path, config, writer, ("lm_head", "mlp.gate.", *kept)))
    parameters = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    requests = [EngineRequest(f"{index}", list(range(5 + index, 45 + index)), parameters) for index in range(6)]
    expected, _ = run_engine(make_config(path), requests)
    for enforce_eager in (False, True):
        options = {"device": "cuda", "dtype": "float16", "enforce_eager": enforce_eager}
        answers, _ = run_engine(make_config(path, **options), requests)
        apart = []
        for request_id, answer in expected.items():
            found = answers[request_id]
            assert answer.prompt_logprobs is not None and found.prompt_logprobs is not None
            pairs = list(zip(found.prompt_logprobs[1:], answer.prompt_logprobs[1:], strict=True))
            pairs += zip(found.logprobs, answer.logprobs, strict=True)
            for mine, theirs in pairs:
                assert mine is not None and theirs is not None
                apart.append(abs(mine.logprobs[0] - theirs.logprobs[0]))
                if mine.token_ids[0] != theirs.token_ids[0]:  # of two that are as likely another one
                    break
        # Some tokens go to another expert, of two that score alike.
        assert sorted(apart)[len(apart) * 9 // 10] < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_keeps_bits_in_deterministic_mode(models: dict[str, str], family: str) -> None:
    """Whatever a request is batched with, and in whatever pieces its prompt comes."""
    options = {"device": "cuda", "dtype": "bfloat16", "deterministic": True}
    requests = make_requests(VOCAB_SIZE)
    together, _ = run_engine(make_config(models[family], **options), requests)
    one_by_one, _ = run_engine(make_config(models[family], **options), *([request] for request in requests))
    check_equal(one_by_one, together, bits=True)
