"""An executor around the simulated worker of the scheduler's tests: an engine core without torch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from shoal.executor.base import Executor
from shoal.messages import BatchResult, ClientMessage, CoreMessage, ScheduledBatch, StartupProgress
from tests.scheduling.simulated_worker import SimulatedWorker


class _CountedFuture(Future[BatchResult]):
    """Tells the executor when the core takes its result."""

    def __init__(self, executor: SimulatedExecutor) -> None:
        super().__init__()
        self.executor = executor

    def result(self, timeout: float | None = None) -> BatchResult:
        self.executor.num_in_flight -= 1
        return super().result(timeout)


class SimulatedExecutor(Executor):
    def __init__(self, worker: SimulatedWorker, fail_at_step: int | None = None) -> None:
        self.worker = worker
        self.fail_at_step = fail_at_step
        self.batches: deque[ScheduledBatch] = deque()
        self.num_in_flight = 0
        self.most_in_flight = 0
        self.closed = False

    def start(self, on_progress: Callable[[StartupProgress], None]) -> dict[str, Any]:
        on_progress(StartupProgress("load weights", 1, 1))
        return {"num_blocks": self.worker.num_blocks}

    def execute(self, batch: ScheduledBatch) -> None:
        self.batches.append(batch)

    def sample(self, step_id: int, grammar_masks: dict[int, bytes] | None = None) -> Future[BatchResult]:
        self.num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        future = _CountedFuture(self)
        if step_id == self.fail_at_step:
            future.set_exception(RuntimeError("the device is on fire"))
        else:
            future.set_result(self.worker.run(self.batches.popleft()))
        return future

    def shutdown(self) -> None:
        self.closed = True


class InMemoryChannel:
    """The core's channel, driven by a test: what was sent, and what comes in."""

    def __init__(self) -> None:
        self.incoming: list[ClientMessage] = []
        self.sent: list[CoreMessage] = []
        self.woken = threading.Event()
        self.on_empty: Callable[[], ClientMessage] | None = None

    def push(self, *messages: ClientMessage) -> None:
        self.incoming += messages

    def receive(self, block: bool, seconds: float | None = None) -> list[ClientMessage]:
        """Where nothing comes `on_empty` has something, at once."""
        if block and not self.incoming:
            assert self.on_empty is not None, "the core waits for messages that never come"
            return [self.on_empty()]
        messages, self.incoming = self.incoming, []
        return messages

    def wait(self, seconds: float) -> None:
        if not self.incoming and self.woken.wait(seconds):
            self.woken.clear()

    def wake(self) -> None:
        self.woken.set()

    def send(self, message: CoreMessage) -> None:
        self.sent.append(message)
