"""A pipeline in simulated time around the simulated worker: when each stage works and when it waits, without waiting.

The engine core runs as it is; only its executor and its channel share a clock that jumps to the next event.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future

from shoal.config.engine_config import EngineConfig
from shoal.engine.core import EngineCore
from shoal.messages import AddRequest, BatchResult, ClientMessage, CoreMessage, CoreOutputs, ScheduledBatch, Shutdown
from shoal.types import EngineRequest
from tests.engine.simulated_executor import InMemoryChannel, SimulatedExecutor
from tests.scheduling.simulated_worker import SimulatedWorker


@dataclasses.dataclass
class Clock:
    now: float = 0.0

    def advance(self, time: float) -> None:
        self.now = max(self.now, time)


class _TimedFuture(Future[BatchResult]):
    """Its result is there from the beginning; taking it takes the clock to when it would have come."""

    def __init__(self, executor: PipelineExecutor, due: float) -> None:
        super().__init__()
        self.executor = executor
        self.due = due

    def done(self) -> bool:
        return self.due <= self.executor.clock.now

    def result(self, timeout: float | None = None) -> BatchResult:
        self.executor.clock.advance(self.due)
        self.executor.pending.remove(self)
        result = super().result(timeout)
        self.executor.worker.last_known_step = result.step_id
        return result


class PipelineExecutor(SimulatedExecutor):
    """Every stage does its steps in order; a step begins at a stage when the stage before has done it, and at the first
    when every token that it reads has come out of the last.

    step_seconds: what a step takes at one stage. host_seconds: from the core to the first stage, and from the last
    back.
    """

    def __init__(
        self,
        worker: SimulatedWorker,
        clock: Clock,
        step_seconds: Callable[[ScheduledBatch], float],
        host_seconds: float,
    ) -> None:
        super().__init__(worker)
        self.clock = clock
        self.step_seconds = step_seconds
        self.host_seconds = host_seconds
        self.work: list[list[tuple[float, float]]] = [[] for _ in range(worker.num_stages)]  # begin and end
        self.step_tokens: list[int] = []
        self.token_at: dict[int, float] = {}  # when the first stage has the token that a slot sampled last
        self.pending: list[_TimedFuture] = []

    def execute(self, batch: ScheduledBatch) -> None:
        for assignment in batch.assigned:
            self.token_at.pop(assignment.slot, None)
        seconds = self.step_seconds(batch)
        self.step_tokens.append(batch.num_tokens)
        time = max([self.clock.now + self.host_seconds] + [self.token_at.get(item.slot, 0.0) for item in batch.work])
        for stage in self.work:
            begin = max(time, stage[-1][1] if stage else 0.0)
            time = begin + seconds
            stage.append((begin, time))
        self.token_at.update({item.slot: time for item in batch.work if item.sample})
        future = _TimedFuture(self, time + self.host_seconds)
        future.set_result(self.worker.run(batch))
        self.pending.append(future)

    def sample(self, step_id: int, grammar_masks: dict[int, bytes] | None = None) -> Future[BatchResult]:
        return self.pending[-1]

    def idle_share(self, start: float, end: float) -> list[float]:
        """Per stage, what part of the time from `start` to `end` it did not work."""
        shares = []
        for stage in self.work:
            busy = sum(max(0.0, min(e, end) - max(b, start)) for b, e in stage)
            shares.append(1 - busy / (end - start))
        return shares


class TimedChannel(InMemoryChannel):
    """Requests come at their times; when the last has been served the core is told to end."""

    def __init__(self, arrivals: list[tuple[float, EngineRequest]]) -> None:
        super().__init__()
        self.arrivals = sorted(arrivals, key=lambda arrival: arrival[0])
        self.executor: PipelineExecutor
        self.token_times: dict[str, list[float]] = {request.request_id: [] for _, request in arrivals}

    def _next_arrival(self) -> float:
        return self.arrivals[0][0] if self.arrivals else float("inf")

    def receive(self, block: bool, seconds: float | None = None) -> list[ClientMessage]:
        clock = self.executor.clock
        if block:
            if not self.arrivals:
                return [Shutdown()]
            clock.advance(self._next_arrival())
        messages: list[ClientMessage] = []
        while self._next_arrival() <= clock.now:
            messages.append(AddRequest(self.arrivals.pop(0)[1]))
        return messages

    def wait(self, seconds: float) -> None:
        self.executor.clock.advance(min(self._next_arrival(), self.executor.pending[0].due))

    def send(self, message: CoreMessage) -> None:
        for delta in message.deltas if isinstance(message, CoreOutputs) else []:
            self.token_times[delta.request_id] += [self.executor.clock.now] * len(delta.token_ids)


def run_pipeline(
    config: EngineConfig,
    arrivals: list[tuple[float, EngineRequest]],
    *,
    num_blocks: int,
    step_seconds: Callable[[ScheduledBatch], float] = lambda batch: 1.0,
    host_seconds: float = 0.2,
) -> tuple[PipelineExecutor, TimedChannel]:
    """Serve requests at their times, from beginning to end."""
    worker = SimulatedWorker(
        num_blocks,
        config.block_size,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.parallel.pipeline_size,
        config.async_scheduling,
    )
    channel = TimedChannel(arrivals)
    executor = channel.executor = PipelineExecutor(worker, Clock(), step_seconds, host_seconds)
    core = EngineCore(config, executor, channel)
    core.start()
    core.run()
    return executor, channel
