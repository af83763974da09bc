"""What a question to a node daemon is, on both sides: services, and the envelopes that carry them.

msgspec over ZeroMQ with keys from the cluster's token. `client` asks, `server` answers, `services` lists what there is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import msgspec

from shoal.cluster.daemon.reports import NodeReport, PeerReport
from shoal.executor.ray_head import Answer

# Of the envelopes. Nodes of another number do not understand each other at all; services say more when they differ.
WIRE_VERSION = 1
# A connection that was not opened in so long is none: strangers cannot hold many.
HANDSHAKE_SECONDS = 3.0
# Neither a question nor an answer is longer.
MAX_BYTES = 64 << 20

RequestType = TypeVar("RequestType", bound=msgspec.Struct)
ResponseType = TypeVar("ResponseType", bound=msgspec.Struct)


class NodeView(Protocol):
    """What a service may know of the node whose daemon runs it. From any thread."""

    @property
    def address(self) -> str:
        """Of this node, under which the others reach it."""

    @property
    def head(self) -> str:
        """HOST:PORT of Ray's head."""

    @property
    def is_head(self) -> bool: ...

    @property
    def daemon_port(self) -> int:
        """Of all daemons of the cluster, TCP and UDP."""

    @property
    def token(self) -> str:
        """With which a service asks other daemons."""

    def peers(self) -> Sequence[PeerReport]:
        """The other nodes, as their beats tell."""

    def report(self) -> NodeReport:
        """What this machine has and runs; measured anew."""

    def ray_nodes(self) -> Answer:
        """What Ray's head says, at most some seconds old. Raises StartupError where it says nothing."""


@dataclasses.dataclass(frozen=True)
class Service(Generic[RequestType, ResponseType]):
    """One thing that a daemon can be asked for.

    run: called with the daemon's node and the request; a ShoalError that it raises is raised where it was asked.
    is_slow: takes more than some milliseconds, so it runs in a thread of its own, beside other questions.
    """

    name: str
    request: type[RequestType]
    response: type[ResponseType]
    run: Callable[[NodeView, RequestType], ResponseType]
    is_slow: bool = True


class Request(msgspec.Struct, array_like=True):
    """`number` comes back in the reply. timeout: seconds that the asker waits."""

    wire_version: int
    shoal_version: str
    number: int
    service: str
    timeout: float
    body: msgspec.Raw


class Reply(msgspec.Struct, array_like=True):
    """error: "" and `body` is the response; else why there is none. wire_version stays first in all versions."""

    wire_version: int
    shoal_version: str
    number: int
    error: str
    body: msgspec.Raw


class Nothing(msgspec.Struct):
    """A request, or a response, that says all by coming."""
