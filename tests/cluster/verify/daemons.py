"""Daemons on addresses of this machine, each with files of its own at the path that is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoal import network
from shoal.cluster.daemon.node_services import NODE_SERVICES
from shoal.cluster.daemon.reports import NodeReport, PeerReport
from shoal.cluster.daemon.server import Server
from shoal.cluster.daemon.wire import Service
from shoal.cluster.ports import NodePorts
from shoal.cluster.verify.service import HashAnswer, HashJobs, HashRequest, find_root

TOKEN = "a-token-of-this-test"


class Node:
    """What a daemon knows of its node, and of the others: (address, state)."""

    is_head = True
    daemon_port = 0
    token = TOKEN

    def __init__(self, address: str, head: str, others: list[tuple[str, str]]) -> None:
        self.address, self.head, self._others = address, head, others

    def peers(self) -> list[PeerReport]:
        return [_peer(address, state) for address, state in self._others]

    def report(self) -> NodeReport:
        raise NotImplementedError


def _peer(address: str, state: str) -> PeerReport:
    """All that is counted is 0."""
    counts: dict[str, Any] = dict.fromkeys(PeerReport.__struct_fields__, 0)
    said = {"address": address, "hostname": "host", "is_head": False, "state": state, "versions": {}, "ranks": []}
    return PeerReport(**counts | said)


@contextlib.contextmanager
def daemons(roots: dict[str, Path], silent: tuple[str, ...] = (), gone: tuple[str, ...] = ()) -> Iterator[str]:
    """HOST:PORT of the head. roots: by address, what lies at /model there. silent, gone: addresses of more nodes."""
    head_port = network.free_port() - 1
    addresses = list(roots)
    head = f"{addresses[0]}:{head_port}"
    everybody = [*((each, "alive") for each in roots), *((each, "lost") for each in silent)]
    everybody += [(each, "left") for each in gone]
    with contextlib.ExitStack() as stack:
        for address, root in roots.items():
            node = Node(address, head, [each for each in everybody if each[0] != address])
            server = Server(
                node, (*NODE_SERVICES, hashing_at(root)), address=address, port=NodePorts(head=head_port).daemon
            )
            server.start()
            stack.callback(server.stop)
        yield head


def hashing_at(root: Path) -> Service[Any, Any]:
    def locate(path: str) -> Path:
        return find_root(str(root) + path)

    return Service("verify.hash", HashRequest, HashAnswer, HashJobs(locate).run)
