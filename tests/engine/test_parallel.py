"""One model on several ranks gives the tokens of one rank: real worker processes, all families, all degrees."""

from __future__ import annotations

import random
from functools import lru_cache

import pytest
import torch

from shoal.config.engine_config import EngineConfig
from shoal.config.resolve import make_engine_config
from shoal.types import EngineRequest, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine.local_engine import Answer, run_engine

MODELS = ["shoal-tiny", "llama", "qwen2", "qwen3", "opt"]
VOCAB_SIZE = 500  # does not divide by 8
QUICK_GRIDS = [(2, 1), (1, 2), (2, 2)]
SLOW_GRIDS = [(4, 1), (1, 4), (2, 4), (4, 2)]
LENGTHS = [1, 2, 5, 16, 17, 40, 64, 100, 130, 200]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {
        family: make_checkpoint(tmp_path_factory.mktemp(family), family, num_hidden_layers=4, vocab_size=VOCAB_SIZE)
        for family in MODELS[1:]
    }
    return {"shoal-tiny": "shoal-tiny", **{family: str(path) for family, path in made.items()}}


def make_config(model: str, **options: object) -> EngineConfig:
    """Prompts in pieces, and a cache so small that requests are preempted."""
    values: dict = {
        "model": model,
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 256,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 80,
        "num_gpu_blocks_override": 40,
        "startup_timeout": 120,
        "step_timeout": 60,
        **options,
    }
    return make_engine_config(**values)


def make_requests(vocab_size: int) -> list[EngineRequest]:
    """Half of them begin as another one does; greedy, seeded draws, penalties, log-probabilities, stop tokens."""
    generator = random.Random(3)
    prompts = [[generator.randrange(vocab_size) for _ in range(length)] for length in LENGTHS]
    prompts += [prompt[: max(1, len(prompt) * 3 // 4)] + [generator.randrange(vocab_size)] for prompt in prompts]
    kinds = [
        SamplingParams(temperature=0.0, max_tokens=12),
        SamplingParams(temperature=0.0, max_tokens=12, logprobs=2),
        SamplingParams(temperature=0.9, top_p=0.9, top_k=40, seed=5, max_tokens=12),
        SamplingParams(temperature=0.8, seed=6, repetition_penalty=1.2, presence_penalty=0.4, max_tokens=12),
        SamplingParams(temperature=0.0, max_tokens=9, stop_token_ids=list(range(0, vocab_size, 3)), min_tokens=2),
        SamplingParams(temperature=0.0, max_tokens=6, prompt_logprobs=1, logit_bias={7: 3.0}),
    ]
    return [EngineRequest(f"r{index}", prompt, kinds[index % len(kinds)]) for index, prompt in enumerate(prompts)]


@lru_cache(maxsize=16)
def alone(model: str, **options: object) -> dict[str, Answer]:
    """What one rank answers."""
    config = make_config(model, **options)
    answers, stats = run_engine(config, make_requests(config.model.vocab_size))
    assert stats.num_preemptions_total > 0
    return answers


def check_equal(answers: dict[str, Answer], expected: dict[str, Answer], *, bits: bool) -> None:
    for request_id, answer in expected.items():
        other = answers[request_id]
        assert other.token_ids == answer.token_ids, request_id
        assert other.finish_reasons == answer.finish_reasons
        if bits:
            assert other.logprobs == answer.logprobs
            assert other.prompt_logprobs == answer.prompt_logprobs
        else:
            for mine, theirs in zip(other.logprobs, answer.logprobs, strict=True):
                assert mine.token_ids == theirs.token_ids
                assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def check_grid(model: str, tensor_size: int, pipeline_size: int, **options: object) -> None:
    parallel = {"tensor_parallel_size": tensor_size, "pipeline_parallel_size": pipeline_size}
    config = make_config(model, distributed_executor_backend="mp", **parallel, **options)
    answers, _ = run_engine(config, make_requests(config.model.vocab_size))
    check_equal(answers, alone(model, **options), bits=config.deterministic)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tensor_size, pipeline_size", QUICK_GRIDS)
def test_tokens_are_those_of_one_rank(models: dict[str, str], model: str, tensor_size: int, pipeline_size: int) -> None:
    check_grid(models[model], tensor_size, pipeline_size)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tensor_size, pipeline_size", SLOW_GRIDS)
def test_tokens_are_those_of_one_rank_at_larger_degrees(
    models: dict[str, str], model: str, tensor_size: int, pipeline_size: int
) -> None:
    check_grid(models[model], tensor_size, pipeline_size)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS[1:])
@pytest.mark.parametrize("tensor_size, pipeline_size", [(2, 1), (4, 1), (2, 2)])
def test_bits_are_those_of_one_rank_in_deterministic_mode(
    models: dict[str, str], model: str, tensor_size: int, pipeline_size: int
) -> None:
    check_grid(models[model], tensor_size, pipeline_size, deterministic=True)


@pytest.mark.multigpu
@pytest.mark.parametrize("model", MODELS[1:])
@pytest.mark.parametrize("tensor_size, pipeline_size", [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4)])
def test_tokens_are_those_of_one_gpu(models: dict[str, str], model: str, tensor_size: int, pipeline_size: int) -> None:
    if torch.cuda.device_count() < tensor_size * pipeline_size:
        pytest.skip(f"needs {tensor_size * pipeline_size} CUDA GPUs")
    check_grid(models[model], tensor_size, pipeline_size, device="cuda")
