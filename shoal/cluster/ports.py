"""Every port of a node, in one table. `shoal node start` gives Ray these, daemons and the doctor look them up here, and
docs/ports.md shows them.

A node's own ports follow the head's, so that HOST:PORT of the head says all of them on every node.
"""

from __future__ import annotations

import dataclasses

from shoal.errors import ConfigError
from shoal.executor.ray_head import DEFAULT_PORT

# Ray's dashboard, where the head is told to have one.
DASHBOARD_PORT = 8265
# One for each process of Ray that works on a node: actors (ranks, replicas), tasks of the users' own.
WORKER_PORTS = (10002, 10999)
_NUM_FOLLOWING = 7


@dataclasses.dataclass(frozen=True)
class Port:
    """One port, or a range (`first` to `last`, both included), that a node listens on.

    protocol: "tcp" or "udp". who: connects to it. setting: the flag that moves it. on: "head", or "all" nodes.
    is_local: only processes of the same machine connect, so no firewall matters. is_optional: see `what`.
    """

    name: str
    first: int
    last: int
    protocol: str
    what: str
    who: str
    setting: str
    on: str = "all"
    is_local: bool = False
    is_optional: bool = False

    @property
    def number(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclasses.dataclass(frozen=True)
class NodePorts:
    """The numbers of one cluster, from its head's port. They are the same on all its nodes."""

    head: int = DEFAULT_PORT
    dashboard: int = DASHBOARD_PORT
    workers: tuple[int, int] = WORKER_PORTS

    def __post_init__(self) -> None:
        """Raises ConfigError where the numbers collide or do not exist."""
        if not 1 <= self.head <= 65535 - _NUM_FOLLOWING:
            raise ConfigError(f"the head's port must leave room for {_NUM_FOLLOWING} more after it; got {self.head}")
        for first, last, whose in (
            (*self.workers, "Ray's workers'"),
            (self.dashboard, self.dashboard, "the dashboard's"),
        ):
            if self.head <= last and first <= self.head + _NUM_FOLLOWING:
                raise ConfigError(
                    f"with --port {self.head} the node's own ports go to {self.head + _NUM_FOLLOWING}, and {first} to "
                    f"{last} are {whose}: choose another --port"
                )

    @property
    def daemon(self) -> int:
        return self.head + 1

    @property
    def node_manager(self) -> int:
        return self.head + 2

    @property
    def object_manager(self) -> int:
        return self.head + 3

    @property
    def metrics_export(self) -> int:
        return self.head + 4

    @property
    def dashboard_agent(self) -> int:
        return self.head + 5

    @property
    def dashboard_agent_http(self) -> int:
        return self.head + 6

    @property
    def runtime_env_agent(self) -> int:
        return self.head + 7

    def table(self) -> tuple[Port, ...]:
        """All ports of a node, in the order of their numbers."""

        def one(name: str, number: int, what: str, who: str, **options: object) -> Port:
            options = {"protocol": "tcp", "setting": "--port of the head", **options}
            return Port(name, number, number, what=what, who=who, **options)  # type: ignore[arg-type]

        return (
            one("head", self.head, "Ray's head: the table of nodes", "all nodes, shoal status", on="head"),
            one("daemon", self.daemon, "the node daemon: questions", "all nodes, shoal status, doctor and verify"),
            one("beats", self.daemon, "the node daemon: heartbeats", "all nodes", protocol="udp"),
            one("node manager", self.node_manager, "Ray's node manager", "all nodes, engines"),
            one("object manager", self.object_manager, "Ray's object store", "all nodes"),
            one("metrics export", self.metrics_export, "Ray's metrics, for Prometheus", "Prometheus", is_optional=True),
            one("dashboard agent", self.dashboard_agent, "Ray's agent (gRPC)", "the head", is_optional=True),
            one("dashboard agent HTTP", self.dashboard_agent_http, "Ray's agent (HTTP)", "the head", is_optional=True),
            one("runtime env agent", self.runtime_env_agent, "Ray's runtime environments", "the node", is_local=True),
            one(
                "dashboard",
                self.dashboard,
                "Ray's dashboard, with --dashboard",
                "browsers",
                on="head",
                setting="–",
                is_optional=True,
            ),
            Port(
                "workers",
                *self.workers,
                protocol="tcp",
                what="Ray's workers: actors of engines and deployments, tasks",
                who="all nodes",
                setting="–",
            ),
        )


def needed_between_nodes(ports: NodePorts, *, is_head: bool) -> tuple[Port, ...]:
    """What must be open on a node to the others for a cluster to work. is_head: the node is the head."""
    return tuple(
        port for port in ports.table() if not port.is_local and not port.is_optional and (port.on == "all" or is_head)
    )
