"""All checks over all facts. Pure: `shoal doctor` and the check before `shoal serve` show what comes out."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.cluster.doctor import collectives, containers, gpus, links, model, network, ports, system, versions
from shoal.cluster.doctor.facts import ClusterFacts, NodeFacts
from shoal.cluster.doctor.findings import Finding, Reporter
from shoal.cluster.reach import OPEN, REFUSED
from shoal.version import __version__


def examine_node(
    node: NodeFacts,
    *,
    has_peers: bool = False,
    is_reached: bool | None = None,
    utilization: float = 0.9,
    num_threads: int | None = None,
) -> list[Finding]:
    """has_peers: it is to work with other machines. The rest as the checks have it."""
    return [
        *versions.check(node),
        *gpus.check(node, utilization),
        *system.check(node, has_peers=has_peers),
        *network.check(node, has_peers=has_peers),
        *ports.check(node),
        *containers.check(node, is_reached=is_reached, num_threads=num_threads),
        *model.check(node),
    ]


def examine(
    facts: ClusterFacts, *, has_peers: bool, utilization: float = 0.9, num_threads: int | None = None
) -> list[Finding]:
    """Each machine, then what is between them. The first node is the one that the doctor runs on."""
    findings = []
    for node in facts.nodes:
        arrived = [each.state in (OPEN, REFUSED) for each in facts.reach if each.target == node.name]
        findings += examine_node(
            node,
            has_peers=has_peers,
            is_reached=any(arrived) if arrived else None,
            utilization=utilization,
            num_threads=num_threads,
        )
    findings += _check_silent(facts)
    if len(facts.nodes) > 1:
        findings += versions.check_equal(facts.nodes)
        findings += model.check_equal(facts.nodes)
        findings += network.check_mtus(facts.nodes)
    findings += system.check_clocks(facts.clocks, facts.nodes[0].name if facts.nodes else "here")
    findings += ports.check_reach(facts.reach, {node.name: node.address for node in facts.nodes})
    findings += links.check(facts.links, {node.address: node.name for node in facts.nodes})
    findings += collectives.check(facts.collectives)
    findings += model.check_memory(facts.nodes, facts.layout)
    return findings


def _check_silent(facts: ClusterFacts) -> Sequence[Finding]:
    findings = []
    for name, reason in facts.silent.items():
        report = Reporter("nodes", name)
        mend = "`shoal node start` there, if it ended; else mend the ways and ports to it that this report names"
        if "of Shoal" in reason:
            mend = f"pip install 'shoal=={__version__}' there, or its version here"
        elif "token" in reason:
            mend = "copy ~/.shoal/cluster-token of the head there (mode 0600)"
        report.fail("answers", reason, mend)
        findings += report.findings
    return findings
