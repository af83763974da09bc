"""What the controller needs of the world: actors that it starts and asks, the router, and a place to remember.

A base of its own, so that tests give it a world without Ray. RayFleet is the one that works.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import msgspec

from shoal.cluster.deploy.records import Launch, Report


class Backend(msgspec.Struct, kw_only=True):
    """What the router says of a server, as far as it matters here."""

    url: str
    available: bool = False
    draining: bool = False
    num_running: int = 0
    why_out: str | None = None


class Fleet(abc.ABC):
    """Nothing here waits for a program: what is not known yet is told the next time."""

    @abc.abstractmethod
    def save(self, state: bytes) -> None:
        """Remember this; whoever controls next reads it."""

    @abc.abstractmethod
    def has_gpus(self) -> bool:
        """Whether any node has one."""

    @abc.abstractmethod
    def start(self, name: str, launch: Launch, *, num_cpus: float, num_gpus: float) -> None:
        """Ask for a replica's actor; one of the name that is there already stays as it is."""

    @abc.abstractmethod
    def reports(self, names: list[str]) -> dict[str, Report | None]:
        """The newest of each; None: the actor is gone, or does not answer any more."""

    @abc.abstractmethod
    def stop(self, name: str) -> None:
        """Begin to end a replica's program."""

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """End an actor, with what it runs, if it runs anything still."""

    @abc.abstractmethod
    def publish(self, text: str, host: str, port: int, admin_key: str | None, launch: Launch) -> None:
        """Give the router this file; start it if there is none."""

    @abc.abstractmethod
    def router(self) -> Report | None:
        """None: there is none."""

    @abc.abstractmethod
    def backends(self) -> Mapping[str, Backend] | None:
        """By URL; None while the router does not answer."""

    @abc.abstractmethod
    def drain(self, url: str) -> int | None:
        """Have the router send nothing new there. Requests that run there; None: the router does not say."""

    @abc.abstractmethod
    def stop_router(self) -> None: ...

    @abc.abstractmethod
    def remove_router(self) -> None: ...


class _Backends(msgspec.Struct):
    backends: list[Backend]


class _Drained(msgspec.Struct):
    num_running: int


def read_backends(answer: bytes) -> dict[str, Backend]:
    """Of /router/backends."""
    return {backend.url: backend for backend in msgspec.json.decode(answer, type=_Backends).backends}


def read_drained(answer: bytes) -> int:
    """Of /router/drain."""
    return msgspec.json.decode(answer, type=_Drained).num_running


def router_file(content: Mapping[str, Any]) -> str:
    """JSON is YAML, and needs no quoting rules of its own."""
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode()
