"""Checks for what containers hide: their own network, memory and processors, and devices of the host."""

from __future__ import annotations

from shoal.cluster.doctor.facts import NodeFacts
from shoal.cluster.doctor.findings import Finding, Reporter
from shoal.config.sizes import format_size

GROUP = "containers"


def check(node: NodeFacts, *, is_reached: bool | None = None, num_threads: int | None = None) -> list[Finding]:
    """is_reached: whether other machines reached this one, None: none tried. num_threads: OMP_NUM_THREADS, if set."""
    report, facts, system = Reporter(GROUP, node.name), node.container, node.system
    if not facts.kind and not facts.memory_limit_bytes and not facts.cpu_limit:
        report.ok("container", "no container, and no limits of a control group")
        return report.findings
    what = facts.kind or "a control group"
    if facts.is_bridged and facts.kind in ("docker", "podman", "container") and not is_reached:
        seen = f"this {what} container has a network of its own ({node.address})"
        mend = f"{'podman' if facts.kind == 'podman' else 'docker'} run --network host …"
        if is_reached is False:
            report.fail("host network", f"{seen}, and no other machine reaches it", mend)
        else:
            report.warn("host network", f"{seen}: containers of other machines do not reach such a one", mend)
    if missing := [name for name in facts.host_rdma_devices if name not in node.network.rdma_devices]:
        report.warn(
            "devices",
            f"the machine has {', '.join(missing)}, and this container no /dev/infiniband: NCCL takes TCP",
            "docker run --device /dev/infiniband --cap-add IPC_LOCK --ulimit memlock=-1 …; on Kubernetes, the RDMA "
            "device plugin's resource",
        )
    if 0 < facts.cpu_limit < system.num_usable_cpus and (num_threads is None or num_threads > facts.cpu_limit):
        threads = max(1, int(facts.cpu_limit))
        report.warn(
            "cpu limit",
            f"{what} is limited to {facts.cpu_limit:g} CPUs, and libraries see {system.num_usable_cpus}: as many "
            "threads stop each other",
            f"export OMP_NUM_THREADS={threads}, or pin the CPUs (docker run --cpuset-cpus, the static CPU manager)",
        )
    if 0 < facts.memory_limit_bytes < system.memory_bytes:
        report.ok(
            "memory limit",
            f"{what} is limited to {format_size(facts.memory_limit_bytes)} of {format_size(system.memory_bytes)}; "
            "beyond, its processes are killed",
        )
    if not any(finding.status != "ok" for finding in report.findings):
        report.ok("container", f"{what}: its network, devices and CPUs are as they should be")
    return report.findings
