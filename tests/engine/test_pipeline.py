"""The engine core over a pipeline in simulated time: no stage idles while there is work, and nobody waits for long."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from shoal.config.engine_config import EngineConfig
from shoal.config.resolve import make_engine_config
from shoal.types import EngineRequest, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine.simulated_pipeline import run_pipeline
from tests.scheduling.test_scheduler import expected_output


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    path: Path = make_checkpoint(tmp_path_factory.mktemp("model"), "qwen2")
    return make_engine_config(model=str(path), max_model_len=256, max_num_seqs=96, max_num_batched_tokens=1024)


def staged(model: EngineConfig, num_stages: int, **changes: object) -> EngineConfig:
    parallel = dataclasses.replace(model.parallel, pipeline_size=num_stages)
    return dataclasses.replace(model, parallel=parallel, **changes)  # type: ignore[arg-type]


def make_request(index: int, num_prompt: int, num_output: int) -> EngineRequest:
    params = SamplingParams(max_tokens=num_output, ignore_eos=True)
    return EngineRequest(f"r{index}", [(index * 7 + j) % 50 for j in range(num_prompt)], params)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("num_requests", [4, 5, 64])
def test_no_stage_idles_while_requests_that_came_at_once_decode(
    model: EngineConfig, num_stages: int, num_requests: int
) -> None:
    arrivals = [(0.0, make_request(index, 20, 60)) for index in range(num_requests)]
    executor, channel = run_pipeline(staged(model, num_stages), arrivals, num_blocks=1000)
    ramped_up = max(times[0] for times in channel.token_times.values()) + num_stages
    ending = min(times[-1] for times in channel.token_times.values()) - num_stages
    assert ending - ramped_up > 50 * num_stages
    assert max(executor.idle_share(ramped_up, ending)) < 0.05
    for _, request in arrivals:
        assert len(channel.token_times[request.request_id]) == len(expected_output(request, 256)[0])


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_steps_become_even_when_many_requests_join_a_few(model: EngineConfig, num_stages: int) -> None:
    arrivals = [(0.0, make_request(index, 1, 100)) for index in range(5)]
    arrivals += [(20.0, make_request(index, 1, 50)) for index in range(5, 64)]
    config = staged(model, num_stages, max_num_batched_tokens=2048)  # 64 prompts of 1 token may go into one step
    executor, _ = run_pipeline(config, arrivals, num_blocks=1000)
    joined = next(step for step, num_tokens in enumerate(executor.step_tokens) if num_tokens > 5)
    even = executor.step_tokens[joined + 2 * num_stages : joined + 40 * num_stages]
    assert set(even) <= {64 // num_stages, -(-64 // num_stages)}


@pytest.mark.parametrize("num_stages", [2, 4])
def test_no_stage_idles_while_requests_come_and_go(model: EngineConfig, num_stages: int) -> None:
    generator = random.Random(num_stages)
    arrivals, time = [], 0.0
    for index in range(300):
        time += generator.expovariate(64 / (40 * num_stages))  # 64 running, 40 rounds each, on average
        arrivals.append((time, make_request(index, generator.randint(1, 120), generator.randint(1, 79))))
    executor, _ = run_pipeline(staged(model, num_stages), arrivals, num_blocks=3000)
    assert max(executor.idle_share(20 * num_stages, time)) < 0.05


@pytest.mark.parametrize(("num_stages", "least_speed"), [(2, 1.5), (4, 2.3)])
@pytest.mark.parametrize("num_prompts", [1, 64])
def test_prompts_alone_are_cut_so_that_all_stages_work(
    model: EngineConfig, num_stages: int, least_speed: float, num_prompts: int
) -> None:
    arrivals = [(0.0, make_request(index, 6400 // num_prompts, 1)) for index in range(num_prompts)]
    config = staged(model, num_stages, max_num_batched_tokens=8192, max_model_len=8192)
    executor, _ = run_pipeline(
        config, arrivals, num_blocks=1000, step_seconds=lambda batch: (1 + batch.num_tokens / 100) / num_stages
    )
    assert executor.clock.now < 65 / least_speed  # one stage would take the 6400 tokens in one step


@pytest.mark.parametrize("num_stages", [2, 4])
def test_steps_are_even_where_a_step_of_more_tokens_takes_longer(model: EngineConfig, num_stages: int) -> None:
    generator, time, arrivals = random.Random(1), 0.0, []
    for index in range(150):
        time += generator.expovariate(1 / (2 * num_stages))
        arrivals.append((time, make_request(index, generator.randint(1, 150), generator.randint(1, 59))))
    executor, _ = run_pipeline(
        staged(model, num_stages), arrivals, num_blocks=1000, step_seconds=lambda batch: 1 + batch.num_tokens / 100
    )
    assert max(executor.idle_share(40 * num_stages, time)) < 0.12


@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("num_requests", [1, 2, 3])
def test_fewer_requests_than_stages_do_not_wait_for_the_host(
    model: EngineConfig, num_stages: int, num_requests: int
) -> None:
    arrivals = [(0.0, make_request(index, 5, 50)) for index in range(num_requests)]
    executor, channel = run_pipeline(staged(model, num_stages), arrivals, num_blocks=200, host_seconds=0.4)
    ramped_up = max(times[0] for times in channel.token_times.values()) + 2 * num_stages
    ending = min(times[-1] for times in channel.token_times.values()) - num_stages
    expected = max(0.0, 1 - num_requests / num_stages)
    assert max(executor.idle_share(ramped_up, ending)) == pytest.approx(expected, abs=0.02)


def test_without_async_scheduling_every_token_goes_through_the_host(model: EngineConfig) -> None:
    config = staged(model, 2, async_scheduling=False)
    _, channel = run_pipeline(config, [(0.0, make_request(0, 5, 20))], num_blocks=200, host_seconds=0.5)
    times = channel.token_times["r0"]
    assert {round(after - before, 6) for before, after in zip(times, times[1:], strict=False)} == {3.0}


@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_prompt_that_comes_while_one_request_decodes_waits_for_a_token_at_most(
    model: EngineConfig, num_stages: int
) -> None:
    for offset in range(4 * num_stages):
        arrival = 20.0 + offset / 4
        arrivals = [(0.0, make_request(0, 5, 60)), (arrival, make_request(1, 5, 5))]
        _, channel = run_pipeline(staged(model, num_stages), arrivals, num_blocks=200, host_seconds=0.1)
        alone, rest_of_a_step = num_stages + 2 * 0.1, 1
        assert channel.token_times["r1"][0] - arrival <= alone + rest_of_a_step + num_stages
