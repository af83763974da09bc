"""The engine core's loop with a simulated executor: messages in, deltas out, without torch."""

from __future__ import annotations

import dataclasses
import re
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from shoal.config.engine_config import EngineConfig
from shoal.config.resolve import make_engine_config
from shoal.distributed.status import RankStatus
from shoal.engine.core import EngineCore, make_scheduler_config
from shoal.errors import ConfigError
from shoal.messages import (
    AbortRequests,
    AddRequest,
    BatchResult,
    ClientMessage,
    CoreOutputs,
    CoreReady,
    Shutdown,
    StartupProgress,
    TokenDelta,
    Utility,
    UtilityResult,
)
from shoal.types import EngineRequest, FinishReason, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine.simulated_executor import InMemoryChannel, SimulatedExecutor
from tests.scheduling.simulated_worker import SimulatedWorker
from tests.scheduling.test_scheduler import expected_output


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    path: Path = make_checkpoint(tmp_path_factory.mktemp("model"), "qwen2")
    config = make_engine_config(model=str(path), max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32)
    return dataclasses.replace(config, block_size=4, generation=3)


def make_core(config: EngineConfig, **executor: object) -> tuple[EngineCore, InMemoryChannel, SimulatedExecutor]:
    worker = SimulatedWorker(40, config.block_size, config.max_num_seqs, config.max_num_batched_tokens)
    channel, simulated = InMemoryChannel(), SimulatedExecutor(worker, **executor)  # type: ignore[arg-type]
    channel.on_empty = Shutdown
    return EngineCore(config, simulated, channel), channel, simulated


def make_request(request_id: str, prompt: list[int], max_tokens: int = 6) -> EngineRequest:
    return EngineRequest(request_id, prompt, SamplingParams(max_tokens=max_tokens, eos_token_ids=[0]))


def deltas_of(channel: InMemoryChannel, request_id: str) -> list[TokenDelta]:
    outputs = [message for message in channel.sent if isinstance(message, CoreOutputs)]
    return [delta for message in outputs for delta in message.deltas if delta.request_id == request_id]


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_serves_requests_and_ends(config: EngineConfig, async_scheduling: bool) -> None:
    core, channel, executor = make_core(dataclasses.replace(config, async_scheduling=async_scheduling))
    core.start()
    requests = [make_request(f"r{i}", [i + 1, 2, 3]) for i in range(9)]
    channel.push(*[AddRequest(request) for request in requests])
    core.run()
    assert isinstance(channel.sent[0], StartupProgress)
    assert isinstance(channel.sent[1], CoreReady) and channel.sent[1].generation == 3
    for request in requests:
        deltas = deltas_of(channel, request.request_id)
        output, reason = expected_output(request, 64)
        assert [token for delta in deltas for token in delta.token_ids] == output
        assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [reason]
    assert executor.most_in_flight == (2 if async_scheduling else 1)
    assert executor.closed
    assert core.stats().num_free_blocks == core.stats().num_blocks
    assert all(message.generation == 3 for message in channel.sent if isinstance(message, CoreOutputs))


def test_abort_ends_a_request_once_and_silently_where_asked(config: EngineConfig) -> None:
    core, channel, _ = make_core(config)
    core.start()
    channel.push(AddRequest(make_request("a", [1], 50)), AddRequest(make_request("b", [1], 50)))
    channel.push(AbortRequests(["a", "unknown"]), AbortRequests(["b"], silent=True))
    core.run()
    assert [delta.finish_reason for delta in deltas_of(channel, "a")] == [FinishReason.ABORT]
    assert deltas_of(channel, "b") == []


def test_shutdown_aborts_what_does_not_finish_in_time(config: EngineConfig) -> None:
    core, channel, _ = make_core(config)
    core.start()
    channel.push(AddRequest(make_request("r", [1], 50)), Shutdown(drain_seconds=0.0))
    core.run()
    assert deltas_of(channel, "r")[-1].finish_reason is FinishReason.ABORT


def test_shutdown_lets_requests_finish(config: EngineConfig) -> None:
    core, channel, _ = make_core(config)
    core.start()
    request = make_request("r", [1], 50)
    channel.push(AddRequest(request), Shutdown(drain_seconds=60.0))
    core.run()
    assert deltas_of(channel, "r")[-1].finish_reason is expected_output(request, 64)[1]


def test_utility_calls(config: EngineConfig) -> None:
    core, channel, _ = make_core(config)
    core.start()
    channel.push(Utility(1, "stats"), Utility(2, "reset_prefix_cache"), Utility(3, "sing"))
    core.run()
    results = {message.call_id: message for message in channel.sent if isinstance(message, UtilityResult)}
    assert results[1].result.num_blocks == 39
    assert results[2].error is None
    assert "sing" in str(results[3].error)


class _Idle(InMemoryChannel):
    """Nothing comes for as long as the core is ready to wait; then on_empty. waits: for how long each time, None: for
    ever."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float | None] = []

    def receive(self, block: bool, seconds: float | None = None) -> list[ClientMessage]:
        if block and not self.incoming:
            self.waits.append(seconds)
            if seconds is not None:
                time.sleep(seconds)
                return []
        return super().receive(block)


class _Counting(SimulatedExecutor):
    """Its rank has counted a token for each step that ran, and tells them a moment after it is asked."""

    num_counted = num_told = num_asked = 0

    def sample(self, step_id: int, grammar_masks: dict[int, bytes] | None = None) -> Future[BatchResult]:
        self.num_counted += 1
        return super().sample(step_id, grammar_masks)

    def tell_counts(self) -> float:
        assert not self.batches and not self.num_in_flight
        self.num_asked += 1
        self.num_told = self.num_counted
        return 0.01

    def rank_statuses(self) -> list[RankStatus]:
        read_at = time.monotonic()
        return [RankStatus(0, 1, 1, 1, 1, 3, 0, "idle", 0, read_at, {}, 0.0, read_at, expert_tokens=(self.num_told,))]


def test_an_idle_core_tells_its_last_counts_once(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.engine.core._LAST_STATS_SECONDS", 0.05)
    worker = SimulatedWorker(40, config.block_size, config.max_num_seqs, config.max_num_batched_tokens)
    channel, executor = _Idle(), _Counting(worker)
    core = EngineCore(config, executor, channel)
    core.start()
    totals: list[list[int]] = []
    num_sent: list[int] = []
    orders = iter([Utility(1, "ping"), AddRequest(make_request("b", [4])), Shutdown()])

    def after_the_wait() -> ClientMessage:
        *_, last = (message for message in channel.sent if isinstance(message, CoreOutputs))
        assert last.deltas == [] and last.stats is not None and last.stats.num_requests_running == 0
        totals.append(last.stats.expert_tokens_total)
        num_sent.append(len(channel.sent))
        return next(orders)

    channel.on_empty = after_the_wait
    channel.push(AddRequest(make_request("a", [1, 2, 3])))
    core.run()
    first, still, second = totals
    assert first == still != second and second == [executor.num_counted]
    assert num_sent[1] == num_sent[0] + 1, "only the answer to the ping"
    assert executor.num_asked == 2, "once after each time of work, and never while steps run"
    times = [seconds for seconds in channel.waits if seconds is not None]
    assert len(times) == 4 and all(seconds <= 0.05 for seconds in times) and channel.waits.count(None) == 3


def test_what_comes_in_that_time_is_served_at_once(config: EngineConfig) -> None:
    core, channel, executor = make_core(config)
    core.start()
    channel.push(AddRequest(make_request("a", [1, 2])))
    began = time.monotonic()
    core.run()  # ends by what on_empty gives
    assert time.monotonic() - began < 0.9 and executor.closed


def test_a_failing_step_ends_the_core_with_its_error(config: EngineConfig) -> None:
    core, channel, executor = make_core(config, fail_at_step=2)
    core.start()
    channel.push(AddRequest(make_request("r", [1], 50)))
    with pytest.raises(RuntimeError, match="on fire"):
        core.run()
    assert executor.closed


@pytest.mark.parametrize("async_scheduling", [True, False])
@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_step_is_in_flight_for_each_stage(config: EngineConfig, num_stages: int, async_scheduling: bool) -> None:
    parallel = dataclasses.replace(config.parallel, pipeline_size=num_stages)
    core, channel, executor = make_core(
        dataclasses.replace(config, parallel=parallel, async_scheduling=async_scheduling, max_num_seqs=8)
    )
    core.start()
    requests = [make_request(f"r{i}", [i + 1, 2, 3], 20) for i in range(9)]
    channel.push(*[AddRequest(request) for request in requests])
    core.run()
    assert executor.most_in_flight == num_stages + int(async_scheduling)
    for request in requests:
        tokens = [token for delta in deltas_of(channel, request.request_id) for token in delta.token_ids]
        assert tokens == expected_output(request, 64)[0]


def test_a_cache_smaller_than_one_request_is_refused(config: EngineConfig) -> None:
    for changes, way_out in (
        ({"device": "cpu"}, "more memory (--kv-cache-memory) or set --max-model-len 60"),
        ({"device": "cuda"}, "more memory (--gpu-memory-utilization, or --kv-cache-memory) or set --max-model-len 60"),
        ({"device": "cuda", "kv_cache_memory": 4096}, "more memory (--kv-cache-memory) or set --max-model-len 60"),
        ({"num_blocks_override": 16}, "set --num-gpu-blocks-override 17 or more, or set --max-model-len 60"),
    ):
        with pytest.raises(ConfigError, match=re.escape(way_out)):
            make_scheduler_config(dataclasses.replace(config, **changes), 16)
    allowed = make_scheduler_config(dataclasses.replace(config, num_blocks_override=17), 17)
    assert allowed.num_blocks == 17, "what it says works"
