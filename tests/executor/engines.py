"""Executors of stand-in workers, and what must not be left when they have ended."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoal.config.engine_config import EngineConfig
from shoal.config.parallel import ParallelConfig
from shoal.config.resolve import make_engine_config
from shoal.executor.distributed import DistributedExecutor
from shoal.executor.launcher import OnExit, WorkerLink
from shoal.executor.multiprocess import LocalLauncher
from shoal.messages import ScheduledBatch, SlotWork, StartupProgress


class StandInLauncher(LocalLauncher):
    """The last rank runs in `other`, a host of tests.namespaces, where one is given."""

    def __init__(
        self,
        config: EngineConfig,
        behaviour: str,
        directory: Path,
        *,
        address: str | None = None,
        token: str | None = None,
        worker_token: str | None = None,
        other: Any = None,
    ) -> None:
        """worker_token: what the workers are given in place of the token."""
        super().__init__(config)
        self._worker_token = worker_token
        self.behaviour, self.directory = behaviour, directory
        self._address, self._token, self._other = address, token, other

    def listen_address(self) -> str | None:
        return self._address

    def token(self) -> str | None:
        return self._token

    def start(self, link: WorkerLink, on_exit: OnExit) -> None:
        super().start(dataclasses.replace(link, token=self._worker_token or link.token), on_exit)

    def command(self, link: WorkerLink, rank: int) -> list[str]:
        program = [sys.executable, "-m", "tests.executor.stand_in", self.behaviour, str(self.directory)]
        command = [*program, *link.command(rank)[3:]]
        is_last = rank == self._parallel.world_size - 1
        return self._other.command(*command) if self._other is not None and is_last else command


def make_config(num_ranks: int = 2, **parallel: Any) -> EngineConfig:
    values = {"tensor_size": num_ranks, "backend": "mp", "startup_timeout": 60.0, "step_timeout": 60.0, **parallel}
    config = make_engine_config(model="shoal-tiny", device="cpu", max_model_len=1500)
    return dataclasses.replace(config, parallel=ParallelConfig(**values))


@contextlib.contextmanager
def stand_ins(
    directory: Path, behaviour: str = "", num_ranks: int = 2, *, hosts: dict[str, Any] | None = None, **parallel: Any
) -> Iterator[DistributedExecutor]:
    """An executor that has not started. At the end none of its processes and files is left."""
    config = make_config(num_ranks, **parallel)
    executor = DistributedExecutor(config, StandInLauncher(config, behaviour, directory, **(hosts or {})))
    try:
        yield executor
    finally:
        name = executor._hub.endpoint.removeprefix("ipc://") if executor._hub is not None else "none"
        executor.shutdown()
        left = [pid for pid in pids(directory) if Path(f"/proc/{pid}").exists()]
        assert not left, f"workers {left} are left"
        assert name not in Path("/proc/net/unix").read_text(), "a socket is left"


def pids(directory: Path) -> list[int]:
    """Of the workers that were started, by rank."""
    return [int(path.read_text()) for path in sorted(directory.glob("pid-*"))]


def ignore(progress: StartupProgress) -> None:
    pass


def make_batch(step_id: int, num_slots: int = 2) -> ScheduledBatch:
    work = [SlotWork(slot, 10, 1, [], True) for slot in range(num_slots)]
    return ScheduledBatch(step_id, 0, [], [], work)


def run_step(executor: DistributedExecutor, step_id: int) -> list[tuple[int, list[int]]]:
    executor.execute(make_batch(step_id))
    result = executor.sample(step_id).result(60)
    return [(each.slot, each.token_ids) for each in result.results]


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
