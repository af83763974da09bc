"""Workers of several ranks as processes, driven step by step from a test: `Ranks` starts them, `main` is one of them.

Run as `python -m tests.worker.ranks RANK TENSOR_SIZE PIPELINE_SIZE STORE_FILE DEVICE`. Orders come in on standard
input, answers go out on standard output, each a length and msgpack.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import BinaryIO, TypeVar

import msgspec

from shoal.config.engine_config import EngineConfig
from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.rendezvous import form_groups
from shoal.messages import BatchResult, ScheduledBatch
from shoal.worker.device import find_device
from shoal.worker.worker import Worker

ROOT = Path(__file__).parents[2]
SECONDS = 90
_LENGTH_BYTES = 4
Message = TypeVar("Message")


class Load(msgspec.Struct, tag="load"):
    """A new worker for this EngineConfig; answered by Loaded."""

    config: bytes


class Allocate(msgspec.Struct, tag="allocate"):
    num_blocks: int


class Step(msgspec.Struct, tag="step"):
    """Execute and sample; answered by Done. Before that this rank sleeps."""

    batch: ScheduledBatch
    sleep: float = 0.0


class Idle(msgspec.Struct, tag="idle"):
    """Answered by Report."""


Order = Load | Allocate | Step | Idle


class Loaded(msgspec.Struct, tag="loaded"):
    num_blocks: int
    weight_bytes: int


class Done(msgspec.Struct, tag="done"):
    result: BatchResult


class Report(msgspec.Struct, tag="report"):
    stage_times: dict[str, float]
    busy_seconds: float


Answer = Loaded | Done | Report


def _write(pipe: BinaryIO, message: object) -> None:
    data = msgspec.msgpack.encode(message)
    pipe.write(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
    pipe.flush()


def _read(pipe: BinaryIO, decode: Callable[[bytes], Message]) -> Message | None:
    length = pipe.read(_LENGTH_BYTES)
    return decode(pipe.read(int.from_bytes(length, "little"))) if len(length) == _LENGTH_BYTES else None


class Ranks:
    """All ranks of a grid. `with Ranks(...) as ranks: ranks.load(config)`, then steps."""

    def __init__(self, directory: Path, *, tensor_size: int = 1, pipeline_size: int = 1, device: str = "cpu") -> None:
        self.num_ranks = tensor_size * pipeline_size
        self.tensor_size, self.pipeline_size = tensor_size, pipeline_size
        self.output_rank = self.num_ranks - tensor_size
        self.is_loaded = False
        self._errors = [(directory / f"rank{rank}.log").open("wb+") for rank in range(self.num_ranks)]
        arguments = [str(tensor_size), str(pipeline_size), str(directory / "store"), device]
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.worker.ranks", str(rank), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors[rank],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(self.num_ranks)
        ]
        self._answers: list[Queue[Answer | None]] = [Queue() for _ in range(self.num_ranks)]
        for rank in range(self.num_ranks):
            threading.Thread(target=self._collect, args=(rank,), daemon=True).start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _collect(self, rank: int) -> None:
        pipe = self._processes[rank].stdout
        assert pipe is not None
        decode = msgspec.msgpack.Decoder(Answer).decode
        while (answer := _read(pipe, decode)) is not None:  # type: ignore[type-var]
            self._answers[rank].put(answer)
        self._answers[rank].put(None)

    def _send(self, rank: int, order: Order) -> None:
        pipe = self._processes[rank].stdin
        assert pipe is not None
        _write(pipe, order)

    def _answer(self, rank: int, kind: type[Message]) -> Message:
        answer = self._answers[rank].get(timeout=SECONDS)
        if answer is None:
            self._processes[rank].wait(10)
            raise AssertionError(f"rank {rank} ended:\n{self.errors(rank)}")
        assert isinstance(answer, kind)
        return answer

    def errors(self, rank: int) -> str:
        return Path(self._errors[rank].name).read_text()

    def kill(self, rank: int) -> None:
        self._processes[rank].kill()
        self._processes[rank].wait()

    def load(self, config: EngineConfig) -> list[Loaded]:
        """What each rank has room for; all get the least of it. Call `idle` between the last step and another load."""
        self.is_loaded = True
        for rank in range(self.num_ranks):
            self._send(rank, Load(config.to_json()))
        loaded = [self._answer(rank, Loaded) for rank in range(self.num_ranks)]
        for rank in range(self.num_ranks):
            self._send(rank, Allocate(min(each.num_blocks for each in loaded)))
        return loaded

    def step(self, batch: ScheduledBatch, sleeps: dict[int, float] | None = None) -> None:
        """Give a step to all ranks. sleeps: seconds by pipeline stage."""
        for rank in range(self.num_ranks):
            self._send(rank, Step(batch, (sleeps or {}).get(rank // self.tensor_size, 0.0)))

    def result(self) -> BatchResult:
        """Of the oldest step whose result was not taken. Ranks before the last stage have none to tell."""
        for rank in range(self.num_ranks - self.tensor_size):
            assert not self._answer(rank, Done).result.results
        results = [self._answer(rank, Done).result for rank in range(self.output_rank, self.num_ranks)]
        assert all(result == results[0] for result in results), "tensor ranks sampled different tokens"
        return results[0]

    def idle(self) -> list[Report]:
        alive = [rank for rank in range(self.num_ranks) if self._processes[rank].poll() is None]
        for rank in alive:
            self._send(rank, Idle())
        return [self._answer(rank, Report) for rank in alive]


def main() -> None:
    rank, tensor_size, pipeline_size, store, device_name = sys.argv[1:]
    # Sooner than the parent gives up: a rank that hangs says where.
    faulthandler.dump_traceback_later(SECONDS - 10, exit=True)
    dims = ParallelDims(rank=int(rank), tensor_size=int(tensor_size), pipeline_size=int(pipeline_size))
    groups = form_groups(
        dims,
        device=find_device(device_name, dims.rank),
        address="127.0.0.1",
        store_file=store,
        startup_timeout=60.0,
        timeout=60.0,
    )
    worker: Worker | None = None
    read, write = sys.stdin.buffer, sys.stdout.buffer
    decode = msgspec.msgpack.Decoder(Order).decode
    while (order := _read(read, decode)) is not None:  # type: ignore[type-var]
        if isinstance(order, Load):
            config = EngineConfig.from_json(order.config)
            worker = Worker(config, groups, device_index=dims.rank, local_size=dims.world_size)
            num_blocks, facts = worker.load(lambda _: None)
            _write(write, Loaded(num_blocks, facts["weight_bytes"]))
            continue
        assert worker is not None
        match order:
            case Allocate(num_blocks):
                worker.allocate(num_blocks, lambda _: None)
            case Step(batch, sleep):
                time.sleep(sleep)
                worker.execute(batch)
                _write(write, Done(worker.sample(batch.step_id)()))
            case Idle():
                worker.idle()
                status = next(each for each in groups.host_status() if each.rank == dims.rank)
                assert status.phase == "idle", status
                _write(write, Report(worker.stage_times(), status.busy_seconds))
    groups.close()
    # Gloo's own threads must not turn a finished test into a crash at exit.
    os._exit(0)


if __name__ == "__main__":
    main()
