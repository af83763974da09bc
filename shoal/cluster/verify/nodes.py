"""Lets the daemons of all nodes hash the same path, and tells how far they are. `shoal verify --cluster` calls it."""

from __future__ import annotations

import dataclasses
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping

from shoal import env, network
from shoal.cluster.daemon.client import ask
from shoal.cluster.daemon.node_services import PEERS, PING
from shoal.cluster.daemon.reports import LEFT, LOST
from shoal.cluster.daemon.wire import Nothing
from shoal.cluster.ports import NodePorts
from shoal.cluster.verify.comparison import FileSums
from shoal.cluster.verify.service import HASH, HashAnswer, HashRequest
from shoal.errors import ConfigError, NodeError, ShoalError
from shoal.network.node_record import read_record

_ASK_SECONDS = 10.0
_WAIT_SECONDS = 0.1
# A node that was not heard may be so for a moment only.
_TRIES = 3
_MOMENTARY = ("silent", "dropped", "unreachable")


@dataclasses.dataclass(frozen=True)
class Nodes:
    """The daemons to ask, HOST:PORT by the node's address, and why others cannot be asked."""

    endpoints: dict[str, str]
    absent: dict[str, str]


def find_nodes(address: str | None, token: str) -> Nodes:
    """All nodes of a cluster: of the one whose head is at `address`, or the one that this machine is a node of.

    Raises ConfigError where there is none, and NodeError where its daemon does not answer.
    """
    record = read_record()
    head = address or env.ray_address() or (record.head if record else None)
    if head is None or head == "auto":
        raise ConfigError(
            "no node runs on this machine, so there is no cluster to compare with: `shoal node start` makes it one, "
            "and --address HEAD:PORT names a cluster that it is no part of"
        )
    host, port = network.split_endpoint(head)
    daemon_port = NodePorts(head=port).daemon
    is_member = record is not None and record.head == head
    first = network.format_endpoint(record.address if is_member and record else host, daemon_port)
    own = ask(first, token, PING, Nothing(), timeout=_ASK_SECONDS).address
    endpoints = {own: first}
    absent = {}
    for peer in ask(first, token, PEERS, Nothing(), timeout=_ASK_SECONDS).peers:
        if peer.state == LOST:
            absent[peer.address] = "it is a node of the cluster, and silent"
        elif peer.state != LEFT:
            endpoints[peer.address] = network.format_endpoint(peer.address, daemon_port)
    return Nodes(endpoints, absent)


class NodeHashing:
    """One question to many nodes. `run` returns when all are done, or raises KeyboardInterrupt at once."""

    def __init__(
        self,
        endpoints: Mapping[str, str],
        token: str,
        path: str,
        *,
        num_jobs: int | None = None,
        use_cache: bool = True,
        also: Iterable[str] = (),
    ) -> None:
        self._endpoints, self._token = endpoints, token
        self._request = HashRequest(
            secrets.token_hex(8), path, num_jobs, use_cache, also=[os.fsencode(name) for name in also]
        )
        self.answers: dict[str, HashAnswer] = {}
        self.errors: dict[str, str] = {}

    def run(self, show: Callable[[Mapping[str, HashAnswer]], None]) -> dict[str, FileSums]:
        """What the nodes have that could tell; `errors` says why others could not. show: is told of news."""
        threads = [
            threading.Thread(target=self._follow, args=(node,), name=f"verify {node}", daemon=True)
            for node in self._endpoints
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            threads[0].join(_WAIT_SECONDS)
            threads = [thread for thread in threads if thread.is_alive()] or threads[:1]
            show(dict(self.answers))
        show(dict(self.answers))
        return {
            node: FileSums(
                {os.fsdecode(name): digest for name, digest in self.answers[node].sums.items()},
                {os.fsdecode(name): reason for name, reason in self.answers[node].unreadable.items()},
            )
            for node in self._endpoints
            if node not in self.errors
        }

    def _follow(self, node: str) -> None:
        num_failures = 0
        while True:
            try:
                answer = ask(self._endpoints[node], self._token, HASH, self._request, timeout=_ASK_SECONDS)
            except NodeError as error:
                num_failures += 1
                if error.reason in _MOMENTARY and num_failures < _TRIES:
                    continue
                self.errors[node] = str(error)
                return
            except ShoalError as error:
                self.errors[node] = str(error)
                return
            except Exception as error:  # a thread's end must not pass for an answer
                self.errors[node] = f"{type(error).__name__}: {error}"
                return
            num_failures = 0
            self.answers[node] = answer
            if answer.error:
                self.errors[node] = answer.error
            if answer.done:
                return
