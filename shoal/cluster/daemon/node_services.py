"""What `shoal status`, joining nodes and the daemons themselves ask a daemon for."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import msgspec

from shoal.cluster import reach
from shoal.cluster.daemon.heart import echo
from shoal.cluster.daemon.reports import NodeReport, PeerReport
from shoal.cluster.daemon.wire import NodeView, Nothing, Service
from shoal.executor.ray_head import Answer
from shoal.version import __version__

_NUM_ECHOES = 8


class Pong(msgspec.Struct):
    """address: of the node that answers."""

    address: str
    shoal_version: str
    pid: int


class Peers(msgspec.Struct):
    """The other nodes; not the one that answers."""

    peers: list[PeerReport]


class ProbeRequest(msgspec.Struct):
    """Try these ports of `address` from the node that is asked. udp: where echoes are answered. timeout: of each."""

    address: str
    tcp: list[int]
    udp: list[int]
    timeout: float = reach.TIMEOUT_SECONDS


class Probed(msgspec.Struct):
    """By port: "open", "refused", "dropped" or "unreachable" (`reach`). source: the node that tried."""

    source: str
    tcp: dict[int, str]
    udp: dict[int, str]


def _ping(node: NodeView, _: Nothing) -> Pong:
    return Pong(node.address, __version__, os.getpid())


def _peers(node: NodeView, _: Nothing) -> Peers:
    return Peers(list(node.peers()))


def _report(node: NodeView, _: Nothing) -> NodeReport:
    return node.report()


def _ray_nodes(node: NodeView, _: Nothing) -> Answer:
    return node.ray_nodes()


def _probe(node: NodeView, request: ProbeRequest) -> Probed:
    def try_echo(port: int) -> str:
        return echo(request.address, port, node.token, timeout=request.timeout)

    with ThreadPoolExecutor(_NUM_ECHOES, thread_name_prefix="echo") as pool:
        echoes = pool.map(try_echo, request.udp)
        tcp = reach.probe_all(((request.address, port) for port in request.tcp), timeout=request.timeout)
        return Probed(
            node.address,
            {port: state for (_, port), state in tcp.items()},
            dict(zip(request.udp, echoes, strict=True)),
        )


PING = Service("ping", Nothing, Pong, _ping, is_slow=False)
PEERS = Service("peers", Nothing, Peers, _peers, is_slow=False)
REPORT = Service("report", Nothing, NodeReport, _report)
RAY_NODES = Service("ray nodes", Nothing, Answer, _ray_nodes)
PROBE = Service("probe", ProbeRequest, Probed, _probe)
NODE_SERVICES = (PING, PEERS, REPORT, RAY_NODES, PROBE)
