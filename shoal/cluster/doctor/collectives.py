"""Checks of all-reduces that were tried: whether ranks of these machines can work together at all, and how fast."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.cluster.doctor.facts import CollectiveFacts
from shoal.cluster.doctor.findings import Finding, Reporter
from shoal.cluster.doctor.links import format_rate, format_seconds

GROUP = "collectives"


def check(collectives: Sequence[CollectiveFacts]) -> list[Finding]:
    findings = []
    for each in collectives:
        report = Reporter(GROUP, ", ".join(each.nodes))
        name = f"all-reduce over {each.backend.upper() if each.backend == 'nccl' else 'Gloo'}"
        over = f" by {each.transport}" if each.transport else ""
        if each.state == "skipped":
            report.skip(name, each.reason)
        elif each.state == "failed":
            report.fail(name, f"{each.num_ranks} ranks{over}: {each.reason}", _mend(each))
        else:
            rate = each.num_bytes / each.seconds if each.seconds else 0.0
            report.ok(
                name,
                f"{each.num_ranks} ranks{over}: {each.num_bytes >> 20} MiB summed in {format_seconds(each.seconds)} "
                f"({format_rate(rate)})",
            )
        findings += report.findings
    findings += _compare_transports(collectives)
    return findings


def _mend(facts: CollectiveFacts) -> str:
    if facts.backend == "nccl":
        return (
            "NCCL_DEBUG=INFO shows its steps; NCCL_SOCKET_IFNAME names the interface, NCCL_IB_DISABLE=1 leaves RDMA "
            "out, NCCL_P2P_DISABLE=1 the direct way between GPUs"
        )
    return (
        "mend the ways, ports and MTUs that this report names; GLOO_SOCKET_IFNAME or SHOAL_HOST_IP name the address on "
        "each machine"
    )


def _compare_transports(collectives: Sequence[CollectiveFacts]) -> list[Finding]:
    """RDMA beside TCP, where both were tried."""
    tried = {each.transport: each for each in collectives if each.backend == "nccl" and each.state != "skipped"}
    rdma, tcp = tried.get("RDMA"), tried.get("TCP")
    if rdma is None or tcp is None:
        return []
    report = Reporter(GROUP, ", ".join(rdma.nodes))
    if rdma.state == "failed" and tcp.state == "ok":
        report.warn("RDMA or TCP", "RDMA fails and TCP works", "NCCL_IB_DISABLE=1, or --communication-protocol tcp")
    elif rdma.state == "ok" and tcp.state == "ok" and rdma.seconds > tcp.seconds:
        report.warn(
            "RDMA or TCP",
            f"RDMA ({format_seconds(rdma.seconds)}) is slower than TCP ({format_seconds(tcp.seconds)})",
            "look at `ibstat` for the rate of the ports, and NCCL_IB_HCA for the right one",
        )
    elif rdma.state == "ok" and tcp.state == "ok":
        report.ok("RDMA or TCP", f"RDMA is {tcp.seconds / rdma.seconds:.1f} times as fast as TCP")
    return report.findings
