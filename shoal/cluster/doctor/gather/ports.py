"""Which of the ports that a node needs are free on this machine, and who holds the others."""

from __future__ import annotations

import contextlib

import psutil

from shoal.cluster import processes
from shoal.cluster.doctor.facts import PortUse
from shoal.cluster.ports import NodePorts
from shoal.network.node_record import read_record


def gather_ports(ports: NodePorts, *, is_head: bool) -> list[PortUse]:
    """is_head: the head's own ports are needed here too. Of a range, those that strangers hold are told one by one."""
    held = _held()
    ours = _own_processes()
    uses = []
    for port in ports.table():
        if port.is_optional or (port.on == "head" and not is_head):
            continue
        for number in range(port.first, port.last + 1):
            pid = held.get((port.protocol, number))
            if (port.protocol, number) not in held:
                continue
            if pid in ours:
                if port.first == port.last:
                    uses.append(PortUse(port.name, number, port.protocol, "ours"))
                continue
            uses.append(PortUse(port.name, number, port.protocol, "taken", _describe(pid)))
        if not any(use.name == port.name for use in uses):
            uses.append(PortUse(port.name, port.first, port.protocol, "free"))
    return uses


def _held() -> dict[tuple[str, int], int | None]:
    """By protocol and number, the process that listens; None where the system does not let us see it."""
    found: dict[tuple[str, int], int | None] = {}
    with contextlib.suppress(psutil.Error, OSError):
        for each in psutil.net_connections("inet"):
            is_udp = each.type.name == "SOCK_DGRAM"
            if each.laddr and (is_udp or each.status == psutil.CONN_LISTEN):
                found.setdefault(("udp" if is_udp else "tcp", each.laddr.port), each.pid)
    return found


def _own_processes() -> set[int | None]:
    """Of the node that runs here."""
    record = read_record()
    if record is None:
        return set()
    session = [entry.process for entry in processes.in_session(record.session)]
    daemon = [record.daemon] if record.daemon is not None else []
    return {process.pid for process in processes.with_descendants([*session, *record.processes, *daemon])}


def _describe(pid: int | None) -> str:
    if pid is None:
        return "a process of another user (`sudo ss -ltnup` shows it)"
    with contextlib.suppress(psutil.Error):
        return f"{psutil.Process(pid).name()} (pid {pid})"
    return f"pid {pid}"
