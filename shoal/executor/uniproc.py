"""UniprocExecutor: one rank, the worker lives in the engine core's process and runs in threads of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from shoal.config.engine_config import EngineConfig
from shoal.executor.base import Executor
from shoal.messages import BatchResult, ScheduledBatch, StartupProgress
from shoal.worker.worker import Worker


class UniprocExecutor(Executor):
    """Two threads: one launches steps in order, the other waits for the device and reads results back.

    So step N + 1 is launched while step N still computes, and the core's own thread schedules meanwhile. Every
    tensor operation is started by the launching thread: OpenMP keeps one team of threads for each thread that calls.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._worker = Worker(config)
        self._launch = ThreadPoolExecutor(1, thread_name_prefix="worker-launch")
        self._collect = ThreadPoolExecutor(1, thread_name_prefix="worker-collect")
        self._executed: Future[None] | None = None

    def start(self, on_progress: Callable[[StartupProgress], None]) -> dict[str, Any]:
        return self._launch.submit(self._worker.start, on_progress).result()

    def execute(self, batch: ScheduledBatch) -> None:
        self._executed = self._launch.submit(self._worker.execute, batch)

    def sample(self, step_id: int, grammar_masks: dict[int, bytes] | None = None) -> Future[BatchResult]:
        executed, self._executed = self._executed, None
        assert executed is not None, "sample follows execute"

        def launch() -> Callable[[], BatchResult]:
            executed.result()  # done already, as this thread runs in order; raises what it raised
            return self._worker.sample(step_id, grammar_masks)

        launched = self._launch.submit(launch)
        return self._collect.submit(lambda: launched.result()())

    def shutdown(self) -> None:
        self._launch.shutdown(wait=True, cancel_futures=True)
        self._collect.shutdown(wait=True, cancel_futures=True)
        self._worker.shutdown()
