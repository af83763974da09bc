"""A worker without a model, `python -m tests.executor.stand_in BEHAVIOUR DIRECTORY --link …`: a real process and link.

Its ranks meet in files of DIRECTORY. Behaviours are words joined by "+"; "word@R" is meant for rank R alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.config.engine_config import EngineConfig
from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.status import OPERATIONS, StatusBoard
from shoal.errors import CollectiveError, ModelError
from shoal.messages import (
    BatchResult,
    ScheduledBatch,
    SlotResult,
    StartupProgress,
    WorkerHello,
    WorkerSetup,
)
from shoal.worker.__main__ import main
from shoal.worker.link import ExecutorLink
from shoal.worker.process import OnProgress, Seat

ALL_REDUCE = OPERATIONS.index("all_reduce")


class StandIn:
    """Answers slot s of step n with token n + s. Before that all ranks meet in files, as in a collective."""

    is_asynchronous = False

    def __init__(
        self, behaviour: set[str], directory: Path, setup: WorkerSetup, seat: Seat, on_progress: OnProgress
    ) -> None:
        if "late" in behaviour:
            time.sleep(600)
        on_progress(StartupProgress("rendezvous"))
        config = EngineConfig.from_json(setup.config)
        self.behaviour, self.directory, self.seat = behaviour, directory, seat
        self.world_size = config.parallel.world_size
        self.is_output = seat.rank == config.parallel.output_rank
        self.is_asynchronous = "asynchronous" in behaviour
        dims = ParallelDims(tensor_size=self.world_size, rank=seat.rank)
        if "own-board" in behaviour:  # ranks that are on several hosts
            self.board, index = StatusBoard.create(1), 0
        else:
            board, index = directory / "board", seat.rank
            if seat.rank == 0:
                self.board = StatusBoard.create(self.world_size)
                write(board, self.board.address)
            else:
                wait_for(board)
                self.board = StatusBoard.open(board.read_text())
        self.status = self.board.record(dims, index)
        self.status_address = self.board.address
        self.batches: dict[int, ScheduledBatch] = {}
        self.environment = setup.environment

    def read_status(self) -> bytes:
        return self.status.raw()

    def load(self, on_progress: OnProgress) -> tuple[int, dict[str, Any]]:
        if "no-weights" in self.behaviour:
            raise ModelError("there is no model.safetensors")
        if "slow-load" in self.behaviour:
            on_progress(StartupProgress("load weights", 10, 1000))
            time.sleep(600)
        on_progress(StartupProgress("load weights", 1000, 1000))
        facts = {"weight_bytes": 1000 + self.seat.rank, "load_seconds": 0.5, "environment": self.environment}
        return 100 - self.seat.rank, facts

    def allocate(self, num_blocks: int, on_progress: OnProgress) -> dict[str, Any]:
        return {"kv_cache_bytes": num_blocks * 10}

    def execute(self, batch: ScheduledBatch) -> None:
        self.status.update(step=batch.step_id, phase="forward")
        if "fails" in self.behaviour and batch.step_id == 3:
            raise RuntimeError("the device is on fire")
        if "stops" in self.behaviour and batch.step_id == 3:  # before it meets the others, not just at any moment
            os.kill(os.getpid(), signal.SIGSTOP)
        self.batches[batch.step_id] = batch

    def sample(self, step_id: int, grammar_masks: dict[int, bytes] | None) -> Callable[[], BatchResult]:
        batch = self.batches.pop(step_id)
        self.meet(f"step-{step_id}")
        extra = sum(len(mask) for mask in (grammar_masks or {}).values())
        return lambda: BatchResult(
            step_id,
            batch.generation,
            [SlotResult(work.slot, [step_id + work.slot + extra]) for work in batch.work],
        )

    def idle(self) -> None:
        assert not self.batches, "an idle check within a step: stages would wait for tokens that are not sampled"
        self.meet("idle")

    def meet(self, name: str) -> None:
        """All ranks of this host's directory come; a peer that has died is seen at once, as by its socket."""
        self.status.enter(0, ALL_REDUCE)
        mine = self.directory / f"{name}.{self.status._numbers[0]}.{self.seat.rank}"
        mine.write_text(str(os.getpid()))
        for rank in range(self.world_size):
            wait_for(mine.with_suffix(f".{rank}"), self.peer_died)
        self.status.leave(0)

    def peer_died(self) -> None:
        """As a collective that lost its peer says it."""
        for record in self.board.read():
            if not Path(f"/proc/{record.pid}").exists() or "Z (" in Path(f"/proc/{record.pid}/status").read_text():
                raise CollectiveError(f"rank {self.seat.rank} is in all_reduce, but rank {record.rank} ended")

    def shutdown(self) -> None:
        if "stuck-at-the-end" in self.behaviour:  # as groups that have lost a peer may be
            time.sleep(600)
        (self.directory / f"ended-{self.seat.rank}").touch()


def write(path: Path, text: str) -> None:
    """So that nobody finds it half-written."""
    path.with_name(f".{path.name}").write_text(text)
    path.with_name(f".{path.name}").rename(path)


def wait_for(path: Path, check: Callable[[], None] = lambda: None) -> None:
    while not path.exists():
        check()
        time.sleep(0.002)


def run() -> int:
    words, directory = sys.argv.pop(1), Path(sys.argv.pop(1))
    rank = int(sys.argv[sys.argv.index("--rank") + 1])
    behaviour = {word.partition("@")[0] for word in words.split("+") if word.partition("@")[2] in ("", str(rank))}
    write(directory / f"pid-{rank}", str(os.getpid()))
    if "silent" in behaviour:
        while True:
            time.sleep(60)
    if "other-version" in behaviour:
        token = json.loads(sys.stdin.readline())["token"]
        link = ExecutorLink(sys.argv[sys.argv.index("--link") + 1], rank, 0, token)
        facts = {"torch version": "1.0", "Shoal version": "0"}
        link.send(WorkerHello(rank, 0, os.getpid(), "node-b", "another host", "10.0.0.2", "eth7", 0, facts))
        while True:
            time.sleep(60)
    return main(lambda setup, seat, on_progress: StandIn(behaviour, directory, setup, seat, on_progress))


if __name__ == "__main__":
    status = run()
    sys.stderr.flush()
    os._exit(status)
