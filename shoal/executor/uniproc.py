"""UniprocExecutor: one rank, the worker lives in the engine core's process and runs in threads of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from shoal.config.engine_config import EngineConfig
from shoal.distributed import set_parallel_groups
from shoal.distributed.rendezvous import single_rank_groups
from shoal.distributed.status import RankStatus, read_record
from shoal.executor.base import Executor
from shoal.messages import BatchResult, ScheduledBatch, StartupProgress
from shoal.worker.worker import Worker

# More than a worker without work takes to say what it counted.
_COUNTING_SECONDS = 0.1


class UniprocExecutor(Executor):
    """Two threads: one launches steps in order, the other waits for the device and reads results back.

    So step N + 1 is launched while step N still computes, and the core's own thread schedules meanwhile. Every
    tensor operation is started by the launching thread: OpenMP keeps one team of threads for each thread that calls.
    """

    def __init__(self, config: EngineConfig) -> None:
        groups = single_rank_groups()
        set_parallel_groups(groups)
        # Replicas of one rank each are processes beside each other: replica i has device i and its share of the host.
        parallel = config.parallel
        self._worker = Worker(config, groups, device_index=parallel.data_rank, local_size=parallel.data_size)
        self._launch = ThreadPoolExecutor(1, thread_name_prefix="worker-launch")
        self._collect = ThreadPoolExecutor(1, thread_name_prefix="worker-collect")
        self._executed: Future[None] | None = None
        self._waits = True

    def start(self, on_progress: Callable[[StartupProgress], None]) -> dict[str, Any]:
        return self._launch.submit(self._start, on_progress).result()

    def _start(self, on_progress: Callable[[StartupProgress], None]) -> dict[str, Any]:
        num_blocks, facts = self._worker.load(on_progress)
        return facts | self._worker.allocate(num_blocks, on_progress)

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

    def rank_statuses(self) -> list[RankStatus]:
        record = read_record(self._worker.groups.status.raw(), time.monotonic())
        return [] if record is None else [record]

    def tell_counts(self) -> float:
        self._launch.submit(self._worker.idle)  # a device that fails here fails in the next step, which says so
        return _COUNTING_SECONDS

    def give_up(self) -> None:
        self._waits = False

    def shutdown(self) -> None:
        self._launch.shutdown(wait=self._waits, cancel_futures=True)
        self._collect.shutdown(wait=self._waits, cancel_futures=True)
        if self._waits:
            self._worker.shutdown()
        set_parallel_groups(None)
