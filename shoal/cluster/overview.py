"""What a cluster is made of now, gathered from node daemons, and from Ray's head beside them. `shoal status` shows it.

Asked from a node, its own daemon says who is there, so that a node that is cut off can say so; from elsewhere, the
head's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from shoal import network
from shoal.cluster.daemon import client
from shoal.cluster.daemon.beats import LOST_SECONDS
from shoal.cluster.daemon.node_services import PEERS, PING, RAY_NODES, REPORT
from shoal.cluster.daemon.reports import ALIVE, FLAPPING, LEFT, LOST, NodeReport, PeerReport
from shoal.cluster.daemon.wire import Nothing
from shoal.cluster.ray_node import ports_of
from shoal.errors import NodeError, ShoalError, StartupError
from shoal.executor import ray_head
from shoal.network.node_record import NodeRecord

# State of a node that Ray knows and whose daemon nobody hears.
NO_DAEMON = "no daemon"
_REPORT_SECONDS = 6.0
_RAY_SECONDS = 20.0


class NodeStatus(msgspec.Struct, kw_only=True):
    """One node. state: "alive", "flapping", "lost", "left" or "no daemon". is_ray_alive: what Ray's head says; None: it
    says nothing. total, free: Ray's resources ("CPU", "GPU"). report: what the node says itself; why not: `trouble`.
    seconds_since_heartbeat: 0 for the node that was asked, None: never heard.
    """

    address: str
    hostname: str
    is_head: bool
    state: str
    seconds_since_heartbeat: float | None
    seconds_since_it_heard_us: float | None = None
    num_flaps: int = 0
    num_restarts: int = 0
    is_ray_alive: bool | None = None
    total: dict[str, float] = {}
    free: dict[str, float] = {}
    report: NodeReport | None = None
    trouble: str = ""
    last_known: PeerReport | None = None


class Overview(msgspec.Struct):
    """seen_from: address of the node whose daemon told; "": no daemon answered, and this is Ray's table alone."""

    head: str
    seen_from: str
    notes: list[str]
    nodes: list[NodeStatus]


def look(head: str, token: str, record: NodeRecord | None) -> Overview:
    """record: of the node that this machine is, None: of none in that cluster.

    Raises NodeError, or StartupError, where neither a daemon nor Ray's head answers.
    """
    notes: list[str] = []
    port = ports_of(head).daemon
    host = network.resolve_head(network.split_endpoint(head)[0])
    endpoints = [network.format_endpoint(host, port)]
    if record is not None and record.address != host:
        endpoints.insert(0, network.format_endpoint(record.address, port))
    failures: list[ShoalError] = []
    for endpoint in endpoints:
        try:
            seen_from = client.ask(endpoint, token, PING, Nothing()).address
            peers = client.ask(endpoint, token, PEERS, Nothing()).peers
            break
        except NodeError as error:
            if error.reason == "token":
                raise
            failures.append(error)
    else:
        return _ray_alone(head, token, failures)
    notes += [f"this machine's own daemon does not answer: {error}" for error in failures]
    own = record is not None and record.address == seen_from
    notes += _splits(peers, seen_from, host, is_here=own)
    nodes = _nodes(network.format_endpoint(host, port), seen_from, host, peers, token, port, notes)
    return Overview(head, seen_from, notes, sorted(nodes, key=lambda node: (not node.is_head, _order(node.address))))


def _nodes(
    head_endpoint: str, seen_from: str, head: str, peers: Sequence[PeerReport], token: str, port: int, notes: list[str]
) -> list[NodeStatus]:
    by_address = {peer.address: peer for peer in peers}
    there = [seen_from, *(peer.address for peer in peers if peer.state in (ALIVE, FLAPPING))]
    with ThreadPoolExecutor(2, thread_name_prefix="look") as pool:
        asking_ray = pool.submit(_ask_ray, head_endpoint, token) if head in there else None
        endpoints = {network.format_endpoint(address, port): address for address in there}
        answers = client.ask_all(endpoints, token, REPORT, Nothing(), timeout=_REPORT_SECONDS)
        ray = asking_ray.result() if asking_ray is not None else None
    reports = {endpoints[endpoint]: answer for endpoint, answer in answers.items()}
    if isinstance(ray, ShoalError):
        notes.append(f"Ray's head does not say what is free: {ray}")
    listed = _latest(ray.nodes) if isinstance(ray, ray_head.Answer) else None
    nodes = []
    for address in [seen_from, *by_address]:
        report, peer = reports.get(address), by_address.get(address)
        known = report if isinstance(report, NodeReport) else peer
        node = NodeStatus(
            address=address,
            hostname=known.hostname if known is not None else address,
            is_head=known.is_head if known is not None else address == head,
            state=peer.state if peer is not None else ALIVE,
            seconds_since_heartbeat=peer.seconds_since_heard if peer is not None else 0.0,
            report=report if isinstance(report, NodeReport) else None,
            trouble=str(report) if isinstance(report, ShoalError) else "",
            last_known=peer,
        )
        if peer is not None:
            node.seconds_since_it_heard_us = peer.seconds_since_it_heard_us
            node.num_flaps, node.num_restarts = peer.num_flaps, peer.num_restarts
        if node.report is not None and node.report.ray_trouble:
            node.trouble = node.report.ray_trouble
        nodes.append(_with_ray(node, listed))
    for address, entry in (listed or {}).items():
        if entry.alive and address not in by_address and address != seen_from:
            nodes.append(_only_ray(entry))
    return nodes


def _ask_ray(endpoint: str, token: str) -> ray_head.Answer | ShoalError:
    try:
        return client.ask(endpoint, token, RAY_NODES, Nothing(), timeout=_RAY_SECONDS)
    except ShoalError as error:
        return error


def _with_ray(node: NodeStatus, listed: dict[str, ray_head.Node] | None) -> NodeStatus:
    if listed is not None:
        entry = listed.get(node.address)
        node.is_ray_alive = entry is not None and entry.alive
        if entry is not None and entry.alive:
            node.total, node.free = entry.resources, entry.free
    return node


def _only_ray(entry: ray_head.Node) -> NodeStatus:
    return NodeStatus(
        address=entry.address,
        hostname=entry.hostname,
        is_head=entry.is_head,
        state=NO_DAEMON if entry.alive else LOST,
        seconds_since_heartbeat=None,
        is_ray_alive=entry.alive,
        total=entry.resources,
        free=entry.free,
    )


def _latest(nodes: Sequence[ray_head.Node]) -> dict[str, ray_head.Node]:
    """A machine that was started anew stands in the head's table several times: as what it is now, it does here."""
    return {node.address: node for node in sorted(nodes, key=lambda node: node.alive)}


def _splits(peers: Sequence[PeerReport], seen_from: str, head: str, *, is_here: bool) -> list[str]:
    """Whether the node that was asked is cut off, as far as it can tell."""
    expected = [peer for peer in peers if peer.state != LEFT]
    lost = [peer for peer in expected if peer.state == LOST]
    name = f"this machine ({seen_from})" if is_here else f"the node that was asked ({seen_from})"
    notes = []
    heads = [peer for peer in lost if peer.address == head]
    if heads:
        silence = heads[0].seconds_since_heard
        since = "ever" if silence is None else f"for {silence:.1f} s"
        notes.append(
            f"{name} is cut off from the head {head}, or the head is down: it has not been heard {since}. "
            "What follows is what was last known here"
        )
    elif len(lost) == len(expected) > 1:
        notes.append(f"{name} hears none of the {len(expected)} other nodes: it may be cut off itself")
    for peer in expected:
        deaf = peer.seconds_since_it_heard_us
        if peer.state != LOST and deaf is not None and deaf > 2 * LOST_SECONDS:
            notes.append(
                f"{peer.hostname} ({peer.address}) is heard, but has not heard {name} for {deaf:.1f} s: packets go one "
                "way only"
            )
    return notes


def _ray_alone(head: str, token: str, failures: Sequence[ShoalError]) -> Overview:
    """A cluster that Shoal did not start, or whose daemons are gone."""
    if importlib.util.find_spec("ray") is None:
        raise failures[-1]
    try:
        answer = ray_head.ask_head(head, token)
    except StartupError as error:
        raise StartupError("; ".join([*map(str, failures), str(error)])) from error
    nodes = [_only_ray(entry) for entry in _latest(answer.nodes).values()]
    notes = [*map(str, failures), "no node daemon answers: this is what Ray's head says, and no more"]
    return Overview(head, "", notes, sorted(nodes, key=lambda node: (not node.is_head, _order(node.address))))


def _order(address: str) -> tuple[int, ...] | tuple[int, str]:
    parts = address.split(".")
    return tuple(map(int, parts)) if len(parts) == 4 and all(part.isdecimal() for part in parts) else (256, address)
