"""How ranks find each other: a store they all reach, and waiting for one another with our own deadline.

`rendezvous` forms the groups through it. Whoever fails tells the others, so that all of them say the same.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import torch

from shoal import network
from shoal.distributed.segment import host_identity
from shoal.errors import ShoalError, StartupError

T = TypeVar("T")
# How long a rank that failed keeps the store up, so that the others read why before it is gone.
_PARTING_SECONDS = 0.5
_FAILED = "failed"


class Peer(msgspec.Struct, frozen=True):
    """What a rank says of itself when it comes."""

    rank: int
    hostname: str
    host_identity: str
    address: str
    pid: int
    facts: dict[str, str]

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.hostname} {self.address}, pid {self.pid})"


def tcp_store(address: str, port: int, rank: int, timeout: float, listener: socket.socket | None = None) -> Any:
    """The store of rank 0, which serves it on address:port; the others connect to it. StartupError after `timeout`.

    The address is one under which all ranks reach rank 0's host. listener: rank 0's, where it listens there already.
    """
    from torch.distributed import TCPStore

    limit = datetime.timedelta(seconds=timeout)
    # By itself torch would listen on all interfaces of the machine.
    descriptor = (listener or network.listen(address, port)).detach() if rank == 0 else None

    def connect() -> Any:
        return TCPStore(
            address,
            port,
            is_master=rank == 0,
            wait_for_workers=False,
            timeout=limit,
            master_listen_fd=descriptor,
        )

    what = "open its store on" if rank == 0 else "reach the store of rank 0 at"
    hint = "; rank 0 has not started, a firewall is between, or no way leads to that address" if rank else ""
    return within(timeout, connect, f"rank {rank} ({socket.gethostname()}) could not {what} {address}:{port}", hint)


def file_store(path: str, world_size: int) -> Any:
    """A store in a file that all ranks see: for ranks of one host. The file is the caller's to remove."""
    from torch.distributed import FileStore

    return FileStore(path, world_size)


def within(seconds: float, call: Callable[[], T], failure: str, hint: str = "") -> T:
    """What `call` returns, or StartupError once `seconds` have passed, even when it cannot be interrupted.

    The thread that hangs in it then stays behind; the process is to end after a StartupError.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="shoal-start")
    thread.start()
    thread.join(seconds)
    if results:
        return results[0]
    if errors and isinstance(errors[0], ShoalError):
        raise errors[0]
    reason = str(errors[0]).split("\n")[0] if errors else f"no answer within {round(seconds, 1):g} s"
    raise StartupError(f"{failure}: {reason}{hint}") from (errors[0] if errors else None)


class Meeting:
    """Phases that all ranks go through together. A rank that does not come within the deadline is named."""

    def __init__(
        self, store: Any, rank: int, world_size: int, *, timeout: float, generation: int, names: Mapping[int, str]
    ) -> None:
        """
        timeout: seconds that each phase may take. generation: of the engine: ranks of another one never meet these.
        names: how to call ranks that have not come yet ("rank 3 (on node-b, 10.0.0.4)").
        """
        self.store = torch.distributed.PrefixStore(f"shoal/{generation}", store)
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self.peers: dict[int, Peer] = {}
        self._names = names

    def arrive(self, address: str, facts: Mapping[str, str]) -> None:
        """Say who this rank is and wait until all have. Facts (versions, a digest of the config) must agree."""
        me = Peer(self.rank, socket.gethostname(), host_identity(), address, os.getpid(), dict(facts))
        replies = self.exchange("rendezvous", msgspec.json.encode(me).decode())
        self.peers = {rank: msgspec.json.decode(reply, type=Peer) for rank, reply in replies.items()}
        self._compare()

    def exchange(self, phase: str, value: str, ranks: Sequence[int] | None = None) -> dict[int, str]:
        """Post this rank's value and return everyone's, by rank. StartupError names those who do not come."""
        ranks = range(self.world_size) if ranks is None else ranks
        deadline = time.monotonic() + self.timeout
        replies: dict[int, str] = {}
        pause = 0.001
        try:
            self.store.set(f"{phase}/{self.rank}", value)
            while True:
                for rank in ranks:
                    if rank not in replies and self.store.check([f"{phase}/{rank}"]):
                        replies[rank] = self.store.get(f"{phase}/{rank}").decode()
                if len(replies) == len(ranks):
                    return replies
                self._check_failed()
                if time.monotonic() >= deadline:
                    break
                time.sleep(pause)
                pause = min(pause * 1.5, 0.05)
        except RuntimeError as error:  # torch's DistStoreError: rank 0 is gone
            raise StartupError(
                f"rank {self.rank} lost the store of rank 0 in phase {phase!r}; rank 0 has ended ({_first_line(error)})"
            ) from error
        missing = [rank for rank in ranks if rank not in replies]
        raise self.fail(
            f"start-up phase {phase!r}: {self._describe(missing)} did not come within {round(self.timeout, 1):g} s; "
            f"{self._describe_arrived(phase, replies)}"
        )

    def run(self, phase: str, call: Callable[[], T], ranks: Sequence[int]) -> T:
        """Do `call`, which blocks until all `ranks` do it too, within the deadline. A failure is told to all."""
        self.exchange(f"{phase}/begin", "", ranks)
        try:
            return within(self.timeout, call, f"start-up phase {phase!r} failed on {self.name(self.rank)}")
        except StartupError as error:
            raise self.fail(str(error)) from error

    def fail(self, message: str) -> StartupError:
        """Tell the others why, so that they end with the same words. Returns the error to raise."""
        with contextlib.suppress(RuntimeError):
            self.store.set(_FAILED, message)
            time.sleep(_PARTING_SECONDS)
        return StartupError(message)

    def name(self, rank: int) -> str:
        if rank in self.peers:
            return self.peers[rank].name
        return self._names.get(rank, f"rank {rank}")

    def _check_failed(self) -> None:
        if self.store.check([_FAILED]):
            raise StartupError(self.store.get(_FAILED).decode())

    def _compare(self) -> None:
        reference = self.peers[0]
        for rank in sorted(self.peers):
            for fact in sorted(self.peers[rank].facts.keys() | reference.facts.keys()):
                mine, theirs = self.peers[rank].facts.get(fact), reference.facts.get(fact)
                if mine != theirs:
                    # Everyone compares the same, so nobody needs to be told.
                    raise StartupError(
                        f"{self.name(rank)} has {fact} {mine}, {self.name(0)} has {theirs}: all must have the same"
                    )

    def _describe(self, ranks: Sequence[int]) -> str:
        return ", ".join(self.name(rank) for rank in ranks)

    def _describe_arrived(self, phase: str, replies: Mapping[int, str]) -> str:
        if phase != "rendezvous":
            return f"here: {self._describe(sorted(replies)) or 'none'}"
        peers = [msgspec.json.decode(reply, type=Peer).name for _, reply in sorted(replies.items())]
        return f"here: {', '.join(peers)}"


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0]
