"""Checks of GPUs: which are there, how they are linked, and who holds their memory."""

from __future__ import annotations

from shoal.cluster.doctor.facts import Gpu, NodeFacts
from shoal.cluster.doctor.findings import Finding, Reporter
from shoal.config.sizes import format_size

GROUP = "gpus"
# What a driver keeps for itself on an idle GPU stays below; a CUDA context alone is about as large.
_IDLE_BYTES = 1 << 30
_LINKS = {
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "the CPU's PCIe bridge",
    "NODE": "PCIe bridges of one CPU",
    "SYS": "the link between two CPUs",
}


def check(node: NodeFacts, utilization: float = 0.9) -> list[Finding]:
    """utilization: the share of a GPU's memory that a model takes (--gpu-memory-utilization)."""
    report, facts = Reporter(GROUP, node.name), node.gpus
    if facts.state == "none":
        report.skip("gpus", "no NVIDIA GPU and no driver: models run on the CPU")
        return report.findings
    if facts.state == "broken":
        mend = "`sudo dmesg | grep -i nvrm` says more; reload the driver or restart the machine"
        if node.container.kind:
            mend = "start the container with the GPUs: docker run --gpus all …, or nvidia.com/gpu limits on Kubernetes"
        report.fail("gpus", f"nvidia-smi does not work: {facts.reason}", mend)
        return report.findings
    visible = _visible(facts.gpus, facts.visible)
    names = sorted({gpu.name for gpu in visible})
    if not visible:
        what = ",".join(facts.visible or [])
        report.fail(
            "gpus",
            f"CUDA_VISIBLE_DEVICES={what!r} hides all {len(facts.gpus)} GPUs",
            "unset CUDA_VISIBLE_DEVICES, or name those that are meant: "
            f"CUDA_VISIBLE_DEVICES={','.join(str(gpu.index) for gpu in facts.gpus)}",
        )
        return report.findings
    hidden = f" ({len(facts.gpus) - len(visible)} more are hidden by CUDA_VISIBLE_DEVICES)" * (
        len(visible) < len(facts.gpus)
    )
    seen = (
        f"{len(visible)} × {' and '.join(names)}, {format_size(min(gpu.total_bytes for gpu in visible))} each{hidden}"
    )
    if len(names) > 1:
        report.warn(
            "gpus",
            f"GPUs of different kinds, the slowest sets the pace: {', '.join(f'{g.index} {g.name}' for g in visible)}",
            "name equal ones with CUDA_VISIBLE_DEVICES",
        )
    else:
        report.ok("gpus", seen)
    for gpu in visible:
        _check_memory(report, gpu, utilization)
    if all(gpu.used_bytes <= _IDLE_BYTES for gpu in visible):
        report.ok("gpu memory", "nobody else holds memory of the GPUs")
    _check_links(report, node, visible)
    return report.findings


def _visible(gpus: list[Gpu], visible: list[str] | None) -> list[Gpu]:
    if visible is None:
        return gpus
    return [
        gpu for gpu in gpus if any(name == str(gpu.index) or (name and gpu.uuid.startswith(name)) for name in visible)
    ]


def _check_memory(report: Reporter, gpu: Gpu, utilization: float) -> None:
    if gpu.used_bytes <= _IDLE_BYTES:
        return
    holders = [
        f"pid {process.pid} ({process.name or 'outside of this container'}, {format_size(process.used_bytes)})"
        for process in gpu.processes
    ]
    seen = (
        f"GPU {gpu.index}: {format_size(gpu.used_bytes)} of {format_size(gpu.total_bytes)} are in use by "
        f"{', '.join(holders) or 'a process that is not shown here'}"
    )
    free_share = int(100 * (gpu.total_bytes - gpu.used_bytes) / gpu.total_bytes) / 100
    pids = " ".join(str(process.pid) for process in gpu.processes if process.name)
    end = f"end what is left over (`kill {pids}`), " if pids else "end the process that holds it, "
    mend = f"{end}name other GPUs with CUDA_VISIBLE_DEVICES, or take less: --gpu-memory-utilization {free_share:.2f}"
    if gpu.processes and all(process.is_shoal for process in gpu.processes):
        report.warn("gpu memory", f"{seen}: a model of Shoal's own", "end that server before another takes these GPUs")
    elif gpu.total_bytes - gpu.used_bytes < utilization * gpu.total_bytes:
        report.fail("gpu memory", seen, mend)
    else:
        report.warn("gpu memory", seen, mend)


def _check_links(report: Reporter, node: NodeFacts, visible: list[Gpu]) -> None:
    if len(visible) < 2:
        return
    indices = {gpu.index for gpu in visible}
    links = [link for link in node.gpus.links if link.first in indices and link.second in indices]
    if not links:
        report.skip("gpu links", "nvidia-smi topo -m does not say how the GPUs are linked")
        return
    kinds: dict[str, list[str]] = {}
    for link in links:
        kinds.setdefault(link.kind, []).append(f"{link.first}–{link.second}")
    what = "; ".join(
        f"{_describe(kind)}: {'all pairs' if len(kinds) == 1 else ', '.join(pairs)}" for kind, pairs in kinds.items()
    )
    slow = [pair for kind, pairs in kinds.items() if kind == "SYS" for pair in pairs]
    variables = node.network.variables
    if variables.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        report.warn(
            "gpu links",
            f"NCCL_P2P_DISABLE={variables['NCCL_P2P_DISABLE']} keeps GPUs from each other's memory ({what})",
            "unset NCCL_P2P_DISABLE, unless a run hangs without it",
        )
    elif slow and len(slow) < len(links):
        report.warn(
            "gpu links",
            what,
            "let tensor groups stay on one CPU's GPUs: order them so with CUDA_VISIBLE_DEVICES",
        )
    else:
        report.ok("gpu links", what)


def _describe(kind: str) -> str:
    if kind.startswith("NV"):
        return f"NVLink ({kind})"
    return f"{_LINKS.get(kind, 'a link')} ({kind})"
