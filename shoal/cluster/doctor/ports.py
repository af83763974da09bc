"""Checks of ports: free on each machine, and open from each to each."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.cluster.doctor.facts import NodeFacts, PortReach
from shoal.cluster.doctor.findings import Finding, Reporter
from shoal.cluster.ports import WORKER_PORTS

GROUP = "ports"


def check(node: NodeFacts) -> list[Finding]:
    """That nobody else holds what a node needs."""
    report = Reporter(GROUP, node.name)
    taken = [use for use in node.ports if use.state == "taken"]
    for use in taken:
        seen = f"port {use.port}/{use.protocol} ({use.name}) is taken by {use.holder}"
        if use.name == "workers":
            report.warn("free ports", f"{seen}: a worker of Ray that is given it does not come up", f"end {use.holder}")
            continue
        pid = use.holder.rpartition("pid ")[2].rstrip(")")
        end = f"`kill {pid}`" if pid.isdecimal() else "end it"
        report.fail(
            "free ports", seen, f"{end}, or begin the cluster at another port: `shoal node start --head --port N`"
        )
    free = [_number(use.name, use.port) for use in node.ports if use.state == "free"]
    ours = [str(use.port) for use in node.ports if use.state == "ours"]
    if not taken and node.ports:
        held = f"this machine's own node holds {', '.join(dict.fromkeys(ours))}" if ours else ""
        seen = "; ".join(filter(None, (held, f"free: {', '.join(dict.fromkeys(free))}" if free else "")))
        report.ok("free ports", seen)
    return report.findings


def check_reach(reach: Sequence[PortReach], addresses: dict[str, str]) -> list[Finding]:
    """One finding for each way on which ports are shut. addresses: of nodes, by name."""
    findings: list[Finding] = []
    ways: dict[tuple[str, str], list[PortReach]] = {}
    for each in reach:
        ways.setdefault((each.source, each.target), []).append(each)
    num_open = 0
    for (source, target), ports in ways.items():
        report = Reporter(GROUP, f"{source} → {target}")
        by_state = {state: [p for p in ports if p.state == state] for state in ("dropped", "unreachable", "refused")}
        if dropped := by_state["dropped"]:
            passing = _list([port for port in ports if port.state == "open"])
            seen = f"a firewall drops what comes to {_list(dropped)}: no answer at all"
            if not passing and len(dropped) == len(ports):
                seen = (
                    f"no answer from {_list(dropped)}: the machine is down or cut off, or a firewall drops all of them"
                )
            elif passing:
                seen += f"; {passing} {'are' if ',' in passing else 'is'} open"
            report.fail("open ports", seen, _open(dropped, addresses.get(source, ""), target))
        origin = addresses.get(source, "")
        if refused := [port for port in by_state["refused"] if port.is_held]:
            report.fail(
                "open ports",
                f"{_list(refused)} refused: reached, and nothing listens there, or a firewall rejects it",
                f"`shoal node start` on {target}, if no node runs there; else {_open(refused, origin, target)}",
            )
        if unreachable := by_state["unreachable"]:
            report.fail(
                "open ports",
                f"{_list(unreachable)}: no route, or a firewall rejects it",
                f"`ip route get {addresses.get(target, target)}` on {source}; firewalls on {target} that reject",
            )
        num_open += not report.findings
        findings += report.findings
    if ways and not findings:
        report = Reporter(GROUP, "")
        shown = _list(next(iter(ways.values())))
        report.ok("open ports", f"open on all {num_open} ways between nodes: {shown}")
        findings = report.findings
    return findings


def _open(ports: Sequence[PortReach], source: str, target: str) -> str:
    """What lets these through on Linux, by the tool that is most likely there."""
    rules = []
    for protocol in ("tcp", "udp"):
        numbers = sorted({_range(port.name, port.port) for port in ports if port.protocol == protocol})
        if numbers:
            listed = ",".join(f"{first}:{last}" if first != last else str(first) for first, last in numbers)
            rules.append(f"-p {protocol} -m multiport --dports {listed}")
    origin = f" -s {source}" if source else ""
    commands = "; ".join(f"sudo iptables -I INPUT{origin} {rule} -j ACCEPT" for rule in rules)
    wide = f"sudo ufw allow from {source}" if source else "sudo ufw allow"
    return f"on {target}: `{commands}`, or all at once, since ranks take any free port: `{wide}`"


def _range(name: str, port: int) -> tuple[int, int]:
    return WORKER_PORTS if name == "workers" else (port, port)


def _number(name: str, port: int) -> str:
    first, last = _range(name, port)
    return f"{first}-{last}" if first != last else str(first)


def _list(ports: Sequence[PortReach]) -> str:
    named = [f"{_number(port.name, port.port)}/{port.protocol} ({port.name})" for port in sorted(ports, key=_key)]
    return ", ".join(dict.fromkeys(named))


def _key(port: PortReach) -> tuple[int, str]:
    return port.port, port.protocol
