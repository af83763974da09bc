"""The life of a worker's process, between the executor's orders: hello, setup, load, allocate, then steps to the end.

`python -m shoal.worker` calls `run`, which needs no torch by itself: what does comes in as `make_rank`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import queue
import socket
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from shoal import network
from shoal.distributed.segment import host_identity
from shoal.errors import ShoalError
from shoal.garbage import spare_what_lives
from shoal.log import get_logger
from shoal.messages import (
    AllocateCache,
    BatchResult,
    ExecuteStep,
    IdleDone,
    IdleStep,
    SampleStep,
    ScheduledBatch,
    StartupProgress,
    StepDone,
    StopWorker,
    WorkerHello,
    WorkerLoaded,
    WorkerReady,
    WorkerSetup,
)
from shoal.version import __version__
from shoal.worker.link import ExecutorLink

logger = get_logger(__name__)

OnProgress = Callable[[StartupProgress], None]


class Rank(Protocol):
    """What runs the steps of one rank: a Worker with its groups. All calls come from one thread."""

    # Whether it sends results to the executor.
    is_output: bool
    # Whether reading a result waits for a device, while the next step can be started.
    is_asynchronous: bool
    # Of this host's status board; empty where there is none.
    status_address: str

    def read_status(self) -> bytes:
        """This rank's status record; from any thread."""
        ...

    def load(self, on_progress: OnProgress) -> tuple[int, dict[str, Any]]: ...

    def allocate(self, num_blocks: int, on_progress: OnProgress) -> dict[str, Any]: ...

    def execute(self, batch: ScheduledBatch) -> None: ...

    def sample(self, step_id: int, grammar_masks: dict[int, bytes] | None) -> Callable[[], BatchResult]: ...

    def idle(self) -> None: ...

    def shutdown(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Seat:
    """Where a rank sits. address, interface: where other ranks reach it. listener: on which rank 0 serves the store of
    the rendezvous; None on the others."""

    rank: int
    address: str
    interface: str
    listener: socket.socket | None


# Returns when the rank has met all others.
MakeRank = Callable[[WorkerSetup, Seat, OnProgress], Rank]


def run(endpoint: str, rank: int, generation: int, token: str, make_rank: MakeRank) -> int:
    """Work for the executor at `endpoint` until it says stop. Returns the exit code; threads may be left behind."""
    link = ExecutorLink(endpoint, rank, generation, token)
    try:
        _serve(link, generation, make_rank)
    except Exception as error:
        _report(link, error)
        return 1
    link.close()
    return 0


def _report(link: ExecutorLink, error: Exception) -> None:
    """Tell the executor why this rank cannot go on."""
    known = isinstance(error, ShoalError)
    if not known:
        traceback.print_exc()
    kind, text = (type(error).__name__, str(error)) if known else ("EngineError", f"{type(error).__name__}: {error}")
    link.fail(kind, text)


def _serve(link: ExecutorLink, generation: int, make_rank: MakeRank) -> None:
    seat = _find_seat(link)
    link.send(_hello(seat, generation))
    setup = link.wait_for(WorkerSetup)
    link.open_channels(setup)
    rank = make_rank(setup, seat, link.report)
    link.show_status(rank.read_status)
    num_blocks, facts = rank.load(link.report)
    link.send(WorkerLoaded(link.rank, num_blocks, facts))
    facts = rank.allocate(link.wait_for(AllocateCache).num_blocks, link.report)
    spare_what_lives()
    link.send(WorkerReady(link.rank, facts, rank.status_address))
    _run_steps(link, rank)
    # In good order only. After a failure nothing comes before the report of it: a group with a lost peer may never
    # close, and closing it would fail the other ranks before the reason is known. The process ends anyway.
    rank.shutdown()


def _find_seat(link: ExecutorLink) -> Seat:
    address = "127.0.0.1"
    if link.endpoint.startswith("tcp://"):
        address = network.host_address(network.split_endpoint(link.endpoint.removeprefix("tcp://"))[0])
    # Held from now on, so that nobody else takes the port.
    listener = network.listen(address, 0) if link.rank == 0 else None
    return Seat(link.rank, address, network.interface_of(address), listener)


def _hello(seat: Seat, generation: int) -> WorkerHello:
    return WorkerHello(
        rank=seat.rank,
        generation=generation,
        pid=os.getpid(),
        hostname=socket.gethostname(),
        host_identity=host_identity(),
        address=seat.address,
        interface=seat.interface,
        store_port=network.port_of(seat.listener) if seat.listener is not None else 0,
        facts=_versions(),
    )


def _versions() -> dict[str, str]:
    """Of what all ranks must have alike. torch's is read without loading it: its environment is not complete yet."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "none"
    return {"Shoal version": __version__, "Python version": platform.python_version(), "torch version": torch}


def _run_steps(link: ExecutorLink, rank: Rank) -> None:
    """In the order of the executor's messages, until the last."""
    answer: Callable[[Callable[[], StepDone | IdleDone]], None]
    if not rank.is_output:
        answer = _drop
    elif rank.is_asynchronous:
        answer = _Collector(link).put
    else:
        answer = partial(_send_at_once, link)
    while True:
        match link.next_step():
            case ExecuteStep(batch):
                rank.execute(batch)
            case SampleStep(step_id, grammar_masks):
                answer(partial(_done, rank.sample(step_id, grammar_masks)))
            case IdleStep(number):
                rank.idle()
                answer(partial(IdleDone, number))
            case StopWorker():
                return


def _done(collect: Callable[[], BatchResult]) -> StepDone:
    return StepDone(collect())


def _drop(make_answer: Callable[[], StepDone | IdleDone]) -> None:
    """What the output rank says holds for all."""


def _send_at_once(link: ExecutorLink, make_answer: Callable[[], StepDone | IdleDone]) -> None:
    link.send_result(make_answer())


class _Collector:
    """Reads results back and sends them, in a thread of its own: the next step starts while the device computes."""

    def __init__(self, link: ExecutorLink) -> None:
        self._link = link
        self._queue: queue.SimpleQueue[Callable[[], StepDone | IdleDone]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="worker-collect", daemon=True).start()

    def put(self, make_answer: Callable[[], StepDone | IdleDone]) -> None:
        self._queue.put(make_answer)

    def _run(self) -> None:
        try:
            while True:
                self._link.send_result(self._queue.get()())
        except Exception as error:
            _report(self._link, error)
            os._exit(1)
