"""What `shoal serve` looks at before it starts a model on several machines: what can be seen in a part of a second.

The same checks as the doctor's, and the same words. What a node does not tell in time is no reason to refuse.
"""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shoal import env, network
from shoal.cluster.daemon.client import ask, ask_all
from shoal.cluster.daemon.node_services import PEERS
from shoal.cluster.daemon.reports import ALIVE
from shoal.cluster.daemon.wire import Nothing
from shoal.cluster.doctor import model, system, versions
from shoal.cluster.doctor import network as network_check
from shoal.cluster.doctor.facts import NodeFacts
from shoal.cluster.doctor.findings import FAIL, WARN, Finding
from shoal.cluster.doctor.gather.model import gather_model
from shoal.cluster.doctor.gather.network import gather_network
from shoal.cluster.doctor.gather.system import gather_container, gather_system
from shoal.cluster.doctor.gather.versions import gather_versions
from shoal.cluster.doctor.render import refusal
from shoal.cluster.doctor.services import GATHER, GatherRequest
from shoal.cluster.ports import NodePorts
from shoal.cluster.reach import DROPPED, OPEN, REFUSED
from shoal.config.parallel import ParallelConfig
from shoal.errors import ShoalError, StartupError
from shoal.log import get_logger
from shoal.network.node_record import read_record

# A head that is silent costs this once, and so do peers. Before silence is a reason to refuse, it costs more.
_WAY_SECONDS = 0.3
_SURE_SECONDS = 3.0
_PEER_SECONDS = 0.6

logger = get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class _Cluster:
    """head: HOST:PORT where the machines meet. address: of this machine's node. daemon: its HOST:PORT; None: none."""

    head: str | None
    address: str | None = None
    daemon: str | None = None


def is_wanted(parallel: ParallelConfig) -> bool:
    """Whether the model's ranks are on several machines."""
    return parallel.num_nodes > 1 or parallel.backend == "ray"


def check_before_serving(name: str, parallel: ParallelConfig, *, has_weights: bool) -> None:
    """Raise StartupError with all that fails. name: of the model, as it was given. has_weights: they are read there."""
    started = time.monotonic()
    cluster = _find_cluster(parallel)
    given = Path(name).expanduser()
    path = str(given.absolute()) if given.is_dir() else name
    with ThreadPoolExecutor(2) as pool:
        there = pool.submit(_ask_peers, cluster, parallel, path if has_weights else None)
        here = _gather(cluster, path if has_weights else None, uses_ray=parallel.backend == "ray")
        peers = there.result()
    findings = _examine(here, peers, uses_ray=parallel.backend == "ray")
    logger.debug("looked at this machine and %d others in %.2f s", len(peers), time.monotonic() - started)
    for finding in findings:
        if finding.status == WARN:
            logger.warning("%s: %s; %s", finding.check, finding.seen, finding.mend)
    if failed := [finding for finding in findings if finding.status == FAIL]:
        raise StartupError(
            f"this will not work (--skip-preflight starts all the same, `shoal doctor --cluster` says more):\n"
            f"{refusal(failed)}"
        )


def _find_cluster(parallel: ParallelConfig) -> _Cluster:
    if parallel.backend != "ray":
        master = parallel.master_address
        return _Cluster(network.format_endpoint(master, parallel.master_port) if master else None)
    record, named = read_record(), env.ray_address()
    if record is None:
        return _Cluster(named if named != "auto" else None)
    if named not in (None, "auto", record.head):
        return _Cluster(named)
    daemon = network.format_endpoint(record.address, NodePorts(network.split_endpoint(record.head)[1]).daemon)
    return _Cluster(record.head, record.address, daemon)


def _gather(cluster: _Cluster, name: str | None, *, uses_ray: bool) -> NodeFacts:
    way = gather_network(cluster.head, cluster.address, timeout=_WAY_SECONDS)
    states = {each.address: each.state for each in way.ways}
    answered = any(state in (OPEN, REFUSED) for state in states.values())
    # A packet may have been lost.
    if states.get(way.address) == DROPPED and (uses_ray or answered):
        way = gather_network(cluster.head, cluster.address, timeout=_SURE_SECONDS)
    return NodeFacts(
        hostname=socket.gethostname(),
        address=way.address,
        versions=gather_versions("", "", load=False),
        system=gather_system(resolve_name=False),
        network=way,
        container=gather_container(way.interface),
        model=gather_model(name) if name is not None else None,
    )


def _ask_peers(cluster: _Cluster, parallel: ParallelConfig, name: str | None) -> list[NodeFacts]:
    """The other nodes that say in time what they have."""
    if cluster.daemon is None:
        return []
    try:
        token = network.load_token(parallel.token_file)
        peers = ask(cluster.daemon, token, PEERS, Nothing(), timeout=_PEER_SECONDS).peers
        port = network.split_endpoint(cluster.daemon)[1]
        endpoints = [network.format_endpoint(peer.address, port) for peer in peers if peer.state == ALIVE]
        request = GatherRequest(name, load_torch=False, ask_gpus=False)
        answers = ask_all(endpoints, token, GATHER, request, timeout=_PEER_SECONDS)
    except ShoalError as error:
        logger.debug("the other nodes were not asked: %s", error)
        return []
    silent = [f"{endpoint} ({answer})" for endpoint, answer in answers.items() if isinstance(answer, ShoalError)]
    if silent:
        logger.debug("these did not say in time what they have: %s", ", ".join(silent))
    return [answer for answer in answers.values() if isinstance(answer, NodeFacts)]


def _examine(here: NodeFacts, peers: Sequence[NodeFacts], *, uses_ray: bool) -> list[Finding]:
    head = here.network.head
    # Where all are on one machine, or nobody knows where the others are, no address is better than another.
    has_peers = bool(head) and not _is_loopback(head)
    ways = network_check.check(here, has_peers=True) if has_peers else []
    if not uses_ray:
        # Machines come in any order: that the other one does not answer yet is no fault, unless it does elsewhere.
        answered = any(way.state in (OPEN, REFUSED) for way in here.network.ways)
        ways = [finding for finding in ways if finding.check != "route" or answered]
    findings = [*system.check(here, has_peers=has_peers, starts_ray=False), *ways, *model.check(here)]
    # Of the host name nothing was asked.
    findings = [finding for finding in findings if finding.check != "host name"]
    if peers:
        findings += versions.check_equal([here, *peers])
        # The cluster may have more nodes than this model needs, so what one of them lacks is no reason to refuse.
        lacking = [finding for peer in peers for finding in model.check(peer)] + model.check_equal([here, *peers])
        findings += [_as_warning(finding) for finding in lacking]
    return findings


def _is_loopback(head: str) -> bool:
    try:
        return network.is_loopback(network.resolve_head(network.split_endpoint(head)[0]))
    except ShoalError:
        return False


def _as_warning(finding: Finding) -> Finding:
    status = WARN if finding.status == FAIL else finding.status
    where = f"{finding.node}: {finding.seen}" if finding.node else finding.seen
    return Finding(finding.group, finding.check, status, finding.node, where, finding.mend)
