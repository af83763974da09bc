"""What nodes say of themselves and of each other: what crosses between daemons, and what `shoal status` shows."""

from __future__ import annotations

import msgspec

ALIVE, FLAPPING, LOST, LEFT = STATES = ("alive", "flapping", "lost", "left")


class RankProgress(msgspec.Struct, frozen=True):
    """One rank on a node, of an engine with `world_size`. seconds: since it went from one step, phase or collective to
    the next. pid: of its process."""

    rank: int
    world_size: int
    pid: int
    step: int
    phase: str
    seconds: float


class PeerReport(msgspec.Struct, frozen=True):
    """Another node, as its beats tell.

    seconds_since_heard: None: never heard. seconds_since_it_heard_us: what the peer last said; None: it has not yet.
    incarnation: when its daemon started, nanoseconds of its own clock. num_flaps: how often it was back after a silence
    under the same incarnation; num_restarts: under another one. num_peers: how many others it knows of. versions: by
    name ("shoal", "ray", "python" …). ranks: of `num_ranks`, those that fit into a beat.
    """

    address: str
    hostname: str
    is_head: bool
    state: str
    seconds_since_heard: float | None
    seconds_since_it_heard_us: float | None
    incarnation: int
    num_flaps: int
    num_restarts: int
    num_peers: int
    versions: dict[str, str]
    num_ranks: int
    ranks: list[RankProgress]


class InterfaceReport(msgspec.Struct, frozen=True):
    """A network interface that is up. speed: megabits a second, 0 where the system does not know; mtu: bytes."""

    name: str
    addresses: list[str]
    speed: int
    mtu: int


class GpuReport(msgspec.Struct, frozen=True):
    """Bytes of memory in all, and in use by whatever process."""

    index: int
    name: str
    memory_total: int
    memory_used: int


class ServerReport(msgspec.Struct, frozen=True):
    """A server or router of Shoal that runs on the node. kind: "serve" or "router". model: as it was typed; "" for a
    router. seconds: since its start. ports: on which it listens."""

    kind: str
    pid: int
    model: str
    seconds: float
    ports: list[int]


class NodeReport(msgspec.Struct, frozen=True):
    """What a machine has and runs. Memory in bytes. interface: the one whose address the others use.

    ray: whether the node's Ray processes run, and what their keeper last said ("" while all is well).
    """

    address: str
    hostname: str
    is_head: bool
    head: str
    interface: str
    interfaces: list[InterfaceReport]
    num_cpus: int
    load: float
    memory_total: int
    memory_available: int
    gpus: list[GpuReport]
    versions: dict[str, str]
    servers: list[ServerReport]
    ranks: list[RankProgress]
    incarnation: int
    uptime: float
    ray: bool
    ray_trouble: str = ""
