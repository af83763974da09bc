"""Workers of several ranks in processes of their own against one worker alone: the same tokens, whatever the steps."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.config.engine_config import EngineConfig
from shoal.config.parallel import ParallelConfig
from shoal.config.resolve import make_engine_config
from shoal.messages import BatchResult, ScheduledBatch
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


@pytest.mark.parametrize("pipeline_size", [2, 4])
def test_stages_give_the_tokens_of_one_rank(checkpoint: Path, tmp_path: Path, pipeline_size: int) -> None:
    config = make_config(checkpoint, 1, pipeline_size)
    busy = 0.0
    with Ranks(tmp_path, pipeline_size=pipeline_size) as ranks:
        for seed, in_flight in enumerate((1, 2, pipeline_size, pipeline_size + 1, 3 * pipeline_size)):
            expected = serve(Alone(make_config(checkpoint, 1, 1)), make_requests(seed), in_flight=1, seed=seed)
            ranks.load(config)
            compare(serve(ranks, make_requests(seed), in_flight=in_flight, seed=seed + 100), expected)
            reports = ranks.idle()
            busy += reports[0].stage_times["busy"]
        assert 0 < busy == pytest.approx(reports[0].busy_seconds)


def test_stages_and_tensor_ranks_give_the_tokens_of_one_rank(checkpoint: Path, tmp_path: Path) -> None:
    expected = serve(Alone(make_config(checkpoint, 1, 1)), make_requests(9), in_flight=1, seed=9)
    with Ranks(tmp_path, tensor_size=2, pipeline_size=2) as ranks:
        ranks.load(make_config(checkpoint, 2, 2))
        compare(serve(ranks, make_requests(9), in_flight=3, seed=109), expected)


@pytest.mark.parametrize("slow_stage", [0, 1, 2])
def test_a_slow_stage_holds_the_others_up_and_no_more(checkpoint: Path, tmp_path: Path, slow_stage: int) -> None:
    expected = serve(Alone(make_config(checkpoint, 1, 1)), make_requests(3, 6), in_flight=1, seed=3)
    with Ranks(tmp_path, pipeline_size=3) as ranks:
        ranks.load(make_config(checkpoint, 1, 3))
        compare(serve(ranks, make_requests(3, 6), in_flight=4, seed=3, sleeps={slow_stage: 0.02}), expected)
