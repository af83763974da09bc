"""LocalLauncher: all ranks as processes of this host, children of the engine core. The registry makes it for `mp`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from shoal import env
from shoal.config.engine_config import EngineConfig
from shoal.errors import StartupError
from shoal.executor.launcher import Launcher, OnExit, WorkerLink
from shoal.executor.worker_process import WorkerProcess


class LocalLauncher(Launcher):
    """Rank r of replica d takes CUDA device d · ranks + r of those that this process sees."""

    def __init__(self, config: EngineConfig, ranks: Sequence[int] | None = None) -> None:
        """ranks: those of this host; None: all."""
        self._parallel = config.parallel
        self._ranks = range(config.parallel.world_size) if ranks is None else ranks
        self._processes: dict[int, WorkerProcess] = {}
        self._lock = threading.Lock()
        self._stopping = False

    def listen_address(self) -> str | None:
        return None

    def token(self) -> str | None:
        return None

    def start(self, link: WorkerLink, on_exit: OnExit) -> None:
        environment = env.subprocess_environment()
        for rank in self._ranks:
            with self._lock:
                if self._stopping:
                    raise StartupError("the engine was ended while its workers were started")
                self._processes[rank] = WorkerProcess(
                    self.command(link, rank), link.token, environment, self._reporter(rank, on_exit)
                )

    def command(self, link: WorkerLink, rank: int) -> list[str]:
        """What is run. A test or a benchmark puts another program in its place that speaks the same messages."""
        return link.command(rank)

    def _reporter(self, rank: int, on_exit: OnExit) -> Callable[[str], None]:
        def report(how: str) -> None:
            if not self._stopping:
                on_exit(rank, how)

        return report

    def describe(self, rank: int) -> str:
        process = self._processes.get(rank)
        return f"rank {rank} (on this host, pid {process.pid})" if process else f"rank {rank} (not started)"

    def device_index(self, rank: int, local_rank: int) -> int:
        return local_rank + self._parallel.data_rank * self._parallel.world_size

    def num_sharing(self, local_size: int) -> int:
        return local_size * self._parallel.data_size

    def stop(self, grace_seconds: float) -> None:
        with self._lock:
            self._stopping = True
        deadline = time.monotonic() + grace_seconds
        for process in self._processes.values():
            process.wait(deadline)
        for process in self._processes.values():  # all at once, not each when the one before is gone
            process.begin_kill()
        for process in self._processes.values():
            process.kill()
