"""Checks of a machine itself: shared memory, limits of processes, its own name, and clocks beside other machines."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from shoal.cluster.doctor.facts import ClockFacts, NodeFacts
from shoal.cluster.doctor.findings import Finding, Reporter
from shoal.config.sizes import format_size

GROUP = "system"
# NCCL passes data between GPUs of one machine through /dev/shm where they do not see each other's memory.
_NCCL_SHM_BYTES = 1 << 30
# The least that Ray's object store takes; in /dev/shm, or, much slower, on a disk.
_RAY_SHM_BYTES = 128 << 20
_LEAST_FILES = 4096
_GOOD_FILES = 65536
_LEAST_PROCESSES = 4096
_LEAST_MEMLOCK = 64 << 20
_WARN_CLOCK_SECONDS = 1.0
_FAIL_CLOCK_SECONDS = 30.0


def check(node: NodeFacts, *, has_peers: bool = False, starts_ray: bool = True) -> list[Finding]:
    """has_peers: other machines are to reach this one. starts_ray: a node of Ray is to start here, if none runs."""
    report = Reporter(GROUP, node.name)
    _check_shared_memory(report, node, starts_ray)
    _check_limits(report, node)
    _check_name(report, node, has_peers)
    return report.findings


def check_clocks(clocks: Sequence[ClockFacts], here: str) -> list[Finding]:
    """here: name of the node that the others' clocks were compared with."""
    findings = []
    for clock in clocks:
        report = Reporter(GROUP, clock.node)
        off = abs(clock.offset_seconds)
        what = "ahead of" if clock.offset_seconds > 0 else "behind"
        seen = f"the clock is {off:.3g} s {what} that of {here} (± {clock.round_trip_seconds / 2:.2g} s)"
        mend = f"`sudo timedatectl set-ntp true` on both, or `sudo chronyc makestep` on {clock.node}"
        # What lies within the error of the measurement is no difference.
        off -= clock.round_trip_seconds / 2
        if off > _FAIL_CLOCK_SECONDS:
            report.fail("clock", seen, mend)
        elif off > _WARN_CLOCK_SECONDS:
            report.warn("clock", seen, mend)
        else:
            report.ok("clock", seen)
        findings += report.findings
    return findings


def _check_shared_memory(report: Reporter, node: NodeFacts, starts_ray: bool) -> None:
    facts, needs = node.system, {}
    runs_ray = any(use.state == "ours" and use.name == "object manager" for use in node.ports)
    if starts_ray and not runs_ray and node.versions.packages.get("ray"):
        needs["Ray's object store"] = _RAY_SHM_BYTES
    if max(len(node.gpus.gpus), facts.num_gpus) > 1:
        needs["NCCL between GPUs"] = _NCCL_SHM_BYTES
    needed = sum(needs.values())
    size = format_size(max(needed, _RAY_SHM_BYTES + _NCCL_SHM_BYTES))
    mend = f"sudo mount -o remount,size={size.replace(' GiB', 'G').replace(' MiB', 'M')} /dev/shm"
    if node.container.kind == "kubernetes":
        mend = "mount an emptyDir with `medium: Memory` and a sizeLimit of 2Gi or more at /dev/shm"
    elif node.container.kind:
        mend = "docker run --ipc=host …, or --shm-size=10g"
    seen = f"/dev/shm has {format_size(facts.shm_bytes)}, {format_size(facts.shm_free_bytes)} free"
    why = " and ".join(f"{format_size(amount)} for {what}" for what, amount in needs.items())
    if facts.shm_free_bytes < needed:
        report.fail("shared memory", f"{seen}; needed are {why}", mend)
    elif facts.shm_bytes < _RAY_SHM_BYTES:
        report.warn("shared memory", f"{seen}: little for NCCL or Ray, should either be used here", mend)
    else:
        report.ok("shared memory", seen)


def _check_limits(report: Reporter, node: NodeFacts) -> None:
    limits, before = node.system.limits, len(report.findings)
    if files := limits.get("nofile"):
        seen = f"a process may open {files.soft} files"
        mend = f"ulimit -n {_GOOD_FILES}"
        if files.hard != -1 and files.hard < _GOOD_FILES:
            mend = (
                f"`* hard nofile {_GOOD_FILES}` in /etc/security/limits.conf (docker run --ulimit nofile={_GOOD_FILES})"
            )
        if 0 <= files.soft < 1024:
            report.fail("limits", f"{seen}: too few for connections of ranks and clients", mend)
        elif 0 <= files.soft < _LEAST_FILES:
            report.warn("limits", f"{seen}: Ray and many clients need more", mend)
    processes = limits.get("nproc")
    if processes and 0 <= processes.soft < _LEAST_PROCESSES:
        report.warn(
            "limits",
            f"a user may have {processes.soft} processes and threads",
            "ulimit -u unlimited, or `* - nproc unlimited` in /etc/security/limits.conf",
        )
    locked = limits.get("memlock")
    if node.network.rdma_devices and locked and 0 <= locked.soft < _LEAST_MEMLOCK:
        report.fail(
            "limits",
            f"{format_size(locked.soft)} of memory may be locked, and RDMA over {', '.join(node.network.rdma_devices)} "
            "locks its buffers",
            "ulimit -l unlimited (docker run --ulimit memlock=-1), or NCCL_IB_DISABLE=1 to use TCP",
        )
    if len(report.findings) == before:
        named = ", ".join(
            f"{name} {'unlimited' if limit.soft == -1 else limit.soft}" for name, limit in sorted(limits.items())
        )
        report.ok("limits", named or "none is known")


def _check_name(report: Reporter, node: NodeFacts, has_peers: bool) -> None:
    """Shoal resolves no host name of its own machine, but Gloo and torch's store do where nobody tells them better."""
    facts = node.system
    if facts.resolve_error:
        report.warn(
            "host name",
            f"this machine's own name {facts.hostname} does not resolve ({facts.resolve_error})",
            f"a line in /etc/hosts: {node.address or 'ADDRESS'} {facts.hostname}",
        )
        return
    loopback = [address for address in facts.host_addresses if ipaddress.ip_address(address).is_loopback]
    addresses = ", ".join(facts.host_addresses)
    if not loopback:
        report.ok("host name", f"{facts.hostname} resolves to {addresses}")
        return
    seen = (
        f"this machine's own name {facts.hostname} resolves to {', '.join(loopback)}: a program that gives others its "
        "name's address sends them to themselves"
    )
    other = node.address if node.address and not ipaddress.ip_address(node.address).is_loopback else "ADDRESS"
    if has_peers or other != "ADDRESS":
        report.warn(
            "host name",
            f"{seen}. Shoal itself uses {other}" if other != "ADDRESS" else seen,
            f"in /etc/hosts, put `{other} {facts.hostname}` in place of {loopback[0]}; name the head by its address",
        )
    else:
        report.ok("host name", f"{facts.hostname} resolves to {addresses}; there are no other machines")
