"""The engine core: schedule -> execute -> update, a step ahead of the pipeline. Runs as `python -m shoal.engine`.

It owns the scheduler and the executor. Requests come in and deltas go out through two sockets of messages.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from shoal.config.engine_config import EngineConfig
from shoal.distributed.status import RankStatus
from shoal.engine.bubbles import BubbleMeter
from shoal.engine.stall import StallWatch, stall_limit, step_allowance
from shoal.errors import ConfigError, EngineDeadError
from shoal.executor.base import Executor
from shoal.log import get_logger
from shoal.messages import (
    AbortRequests,
    AddRequest,
    BatchResult,
    ClientMessage,
    CoreMessage,
    CoreOutputs,
    CoreReady,
    EngineStats,
    RankStats,
    Shutdown,
    TokenDelta,
    Utility,
    UtilityResult,
)
from shoal.scheduling import Scheduler, SchedulerConfig

_STATS_INTERVAL_SECONDS = 0.2
# So long after the last step what ranks counted in it is asked for, and told.
_LAST_STATS_SECONDS = 1.0
_WAITING_SECONDS = 0.001
# How long a step is waited for before somebody looks after its ranks.
_LOOK_SECONDS = 0.25
_MOST_SECONDS_A_LOOK = 1.0

logger = get_logger(__name__)


class CoreChannel(Protocol):
    """The core's end of the sockets to the API server."""

    def receive(self, block: bool, seconds: float | None = None) -> list[ClientMessage]:
        """All messages that have come; with `block` at least one, or none after so many seconds."""
        ...

    def wait(self, seconds: float) -> None:
        """Return when a message has come or `wake` has been called, or after so long."""
        ...

    def wake(self) -> None:
        """End this `wait`, or else the next; called from any thread."""
        ...

    def send(self, message: CoreMessage) -> None: ...


class EngineCore:
    """One engine: requests in, token deltas out."""

    def __init__(self, config: EngineConfig, executor: Executor, channel: CoreChannel) -> None:
        self.config = config
        self._executor = executor
        self._channel = channel
        # A step for each stage to work on, and one that waits before the first stage.
        self._max_in_flight = config.parallel.pipeline_size + int(config.async_scheduling)
        self._in_flight: deque[Future[BatchResult]] = deque()
        self._awaited: Future[BatchResult] | None = None  # wakes the channel when it is done
        self._num_steps = 0
        self._last_step_time = time.monotonic()
        self._last_stats_time = 0.0
        # When an engine that is idle by then tells its stats once more.
        self._last_stats_due: float | None = None
        self._stop_at: float | None = None
        self._looked_at = 0.0
        self._stall: StallWatch
        self._scheduler: Scheduler
        self._bubbles: BubbleMeter

    def start(self, before_ready: Callable[[], None] = lambda: None) -> None:
        """Bring the workers up and tell the client, after `before_ready`. Raises what the executor raises."""
        started = time.monotonic()
        info = self._executor.start(self._channel.send)
        num_blocks = info["num_blocks"]
        full_step_seconds = info.get("full_step_seconds", 0.0)
        limit = stall_limit(self.config.parallel.stall_timeout, full_step_seconds)
        self._stall = StallWatch(limit, _MOST_SECONDS_A_LOOK, steps_take=step_allowance(full_step_seconds))
        self._scheduler = Scheduler(make_scheduler_config(self.config, num_blocks))
        self._bubbles = BubbleMeter(self._executor.stage_busy_seconds)
        before_ready()
        info["startup_seconds"] = round(time.monotonic() - started, 2)
        self._channel.send(
            CoreReady(self.config.generation, self.config.max_model_len, num_blocks, self.config.block_size, info)
        )

    def run(self) -> None:
        """Serve until a Shutdown message has come and what it lets finish has finished.

        Raises what a step raised, once the executor is shut down.
        """
        try:
            while True:
                self._take_messages()
                if self._stop_at is not None and self._drained():
                    break
                self._step()
        finally:
            self._executor.shutdown()

    def _take_messages(self) -> None:
        idle = not self._in_flight and not self._scheduler.has_work() and self._stop_at is None
        deltas: list[TokenDelta] = []
        for message in self._wait_for_messages() if idle else self._channel.receive(block=False):
            match message:
                case AddRequest(request):
                    self._scheduler.add(request)
                case AbortRequests(request_ids, silent):
                    deltas += self._scheduler.abort(request_ids, silent=silent)
                case Utility(call_id, call):
                    self._channel.send(self._answer(call_id, call))
                case Shutdown(drain_seconds):
                    self._stop_at = time.monotonic() + drain_seconds
        deltas += self._scheduler.take_early_deltas()
        if idle:
            self._last_step_time = time.monotonic()
        if deltas:
            self._send(deltas)

    def _wait_for_messages(self) -> list[ClientMessage]:
        """While there is nothing to do. Ranks tell their counts now and then: some time after the last step they are
        asked for the last ones, and once these are there the stats go out."""
        are_told = False
        while self._last_stats_due is not None:
            messages = self._channel.receive(True, max(self._last_stats_due - time.monotonic(), 0.0))
            if messages:
                return messages
            if are_told:
                self._last_stats_due = None
                self._last_step_time = time.monotonic()  # an idle engine waits for no step
                self._send([])
            else:
                are_told = True
                self._last_stats_due = time.monotonic() + self._executor.tell_counts()
        return self._channel.receive(block=True)

    def _step(self) -> None:
        """Launch the next step if there is one; take in the oldest result when no more may be in flight."""
        batch = self._scheduler.schedule()
        if batch is not None:
            self._executor.execute(batch)
            if not self._in_flight:
                self._bubbles.begin()
            self._in_flight.append(self._executor.sample(batch.step_id))
        if len(self._in_flight) >= self._max_in_flight:
            self._take_result()
        elif batch is None and self._in_flight:
            self._take_result_or_news()
        elif batch is None and self._scheduler.has_work():
            time.sleep(_WAITING_SECONDS)  # all there is waits for KV from outside
            self._send([])

    def _take_result_or_news(self) -> None:
        """Wait for the oldest result, or for a message: it may bring a request for which the pipeline has room."""
        oldest = self._in_flight[0]
        if oldest is not self._awaited:
            self._awaited = oldest
            oldest.add_done_callback(lambda _: self._channel.wake())
            self._begin_waiting()
        self._channel.wait(_LOOK_SECONDS)
        if oldest.done():
            self._take_result()
        else:
            self._look_at_ranks()

    def _await_oldest(self) -> BatchResult:
        oldest = self._in_flight[0]
        if not oldest.done() and oldest is not self._awaited:
            self._begin_waiting()
        while True:
            try:
                return oldest.result(_LOOK_SECONDS)
            except TimeoutError:
                if oldest.done():  # the step's own error
                    raise
                self._look_at_ranks()

    def _begin_waiting(self) -> None:
        self._stall.begin()
        self._looked_at = time.monotonic()

    def _look_at_ranks(self) -> None:
        """A step takes long: say that this process is there, and see whether the ranks get on, twice a second at most.

        Raises EngineDeadError where they do not.
        """
        now = time.monotonic()
        if now - self._looked_at < _LOOK_SECONDS / 2:
            return
        elapsed, self._looked_at = now - self._looked_at, now
        if self._stall.look(self._executor.rank_statuses(), elapsed):
            explanation = self._executor.explain_stall()
            self._executor.give_up()
            raise EngineDeadError(f"no rank has got on for {self._stall.limit:g} s (--stall-timeout): {explanation}")
        self._send([])

    def _take_result(self) -> None:
        result = self._await_oldest()
        self._in_flight.popleft()
        self._stall.begin()
        if not self._in_flight:
            self._bubbles.end()
        self._num_steps += 1
        self._last_step_time = time.monotonic()
        self._last_stats_due = self._last_step_time + _LAST_STATS_SECONDS
        self._send(self._scheduler.update(result))

    def _send(self, deltas: list[TokenDelta]) -> None:
        now = time.monotonic()
        stats = None
        if now - self._last_stats_time >= _STATS_INTERVAL_SECONDS or not self._scheduler.num_unfinished:
            self._last_stats_time = now
            stats = self.stats()
        if deltas or stats is not None:
            self._channel.send(CoreOutputs(self.config.generation, deltas, stats))

    def _drained(self) -> bool:
        """Whether nothing runs any more; past the deadline what still runs is aborted first."""
        assert self._stop_at is not None
        if self._scheduler.num_unfinished and time.monotonic() >= self._stop_at:
            self._send(self._scheduler.abort_all())
        return not self._scheduler.num_unfinished and not self._in_flight

    def _answer(self, call_id: int, call: str) -> UtilityResult:
        result: Any = None
        match call:
            case "ping":
                result = "pong"
            case "stats":
                result = self.stats()
            case "reset_prefix_cache":
                self._scheduler.reset_prefix_cache()
            case _:
                return UtilityResult(call_id, error=f"unknown call {call!r}; known: ping, stats, reset_prefix_cache")
        return UtilityResult(call_id, result)

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        pool, counters = scheduler.pool, scheduler.counters
        self._bubbles.update()
        statuses = self._executor.rank_statuses()
        return EngineStats(
            num_requests_running=scheduler.num_running,
            num_requests_waiting=scheduler.num_waiting,
            kv_cache_usage=1.0 - pool.num_free / pool.num_usable,
            num_blocks=pool.num_usable,
            num_free_blocks=pool.num_free,
            num_steps_total=self._num_steps,
            num_preemptions_total=counters.num_preemptions,
            prompt_tokens_total=counters.prompt_tokens,
            generation_tokens_total=counters.generation_tokens,
            prefix_cache_queries_total=counters.prefix_cache_queries,
            prefix_cache_hits_total=counters.prefix_cache_hits,
            seconds_since_last_step=time.monotonic() - self._last_step_time,
            stage_bubbles=self._bubbles.shares,
            ranks=[_rank_stats(status) for status in statuses],
            expert_tokens_total=_expert_tokens(statuses),
            seconds_without_progress=self._stall.seconds_beyond_steps,
        )


def _expert_tokens(statuses: list[RankStatus]) -> list[int]:
    """Of all stages together."""
    totals = [0] * max((status.first_expert + len(status.expert_tokens) for status in statuses), default=0)
    for status in statuses:
        for expert, tokens in enumerate(status.expert_tokens, status.first_expert):
            totals[expert] += tokens
    return totals


def _rank_stats(status: RankStatus) -> RankStats:
    return RankStats(
        status.rank,
        status.step,
        status.num_collectives,
        max(status.seconds_since_progress, 0.0),
        status.collective_seconds,
        status.host_bytes,
        status.device_bytes,
    )


def _how_to_hold_more(config: EngineConfig) -> str:
    """What decides about the size of the cache here."""
    if config.num_blocks_override is not None:
        num_blocks = -(-config.max_model_len // config.block_size) + 1  # one holds no tokens
        return f"set --num-gpu-blocks-override {num_blocks} or more,"
    if config.device == "cuda" and config.kv_cache_memory is None:
        return "give it more memory (--gpu-memory-utilization, or --kv-cache-memory)"
    return "give it more memory (--kv-cache-memory)"


def make_scheduler_config(config: EngineConfig, num_blocks: int) -> SchedulerConfig:
    """The scheduler's limits; the cache must hold one request of full length, or it could never run to its end."""
    capacity = (num_blocks - 1) * config.block_size
    if capacity < config.max_model_len:
        raise ConfigError(
            f"the KV cache holds {capacity} tokens, less than max_model_len {config.max_model_len}; "
            f"{_how_to_hold_more(config)}{f' or set --max-model-len {capacity} or less' if capacity else ''}"
        )
    return SchedulerConfig(
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        enable_chunked_prefill=config.enable_chunked_prefill,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        by_priority=config.scheduling_policy == "priority",
        num_stages=config.parallel.pipeline_size,
        async_scheduling=config.async_scheduling,
        generation=config.generation,
    )
