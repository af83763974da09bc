"""Checks of one machine's network: the address that others are told, why that one, which interfaces lead anywhere."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.cluster.doctor.facts import InterfaceFacts, NetworkFacts, NodeFacts
from shoal.cluster.doctor.findings import Finding, Reporter

GROUP = "network"
_ANSWERS = ("open", "refused")
_SLOW_MBITS = 1000


def check(node: NodeFacts, *, has_peers: bool = False) -> list[Finding]:
    """has_peers: there are to be other machines, so that being reachable is no matter of taste."""
    report, facts = Reporter(GROUP, node.name), node.network
    _check_address(report, facts, has_peers)
    _check_ways(report, facts)
    _check_variables(report, facts)
    _check_rdma(report, facts)
    return report.findings


def check_mtus(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """That the interfaces by which machines talk take packets of one size."""
    report = Reporter(GROUP, "")
    by_mtu: dict[int, list[tuple[str, str]]] = {}
    for node in nodes:
        if interface := _used(node.network):
            by_mtu.setdefault(interface.mtu, []).append((node.name, interface.name))
    if len(by_mtu) == 1:
        report.ok("same MTU", f"all interfaces between nodes have MTU {next(iter(by_mtu))}")
    elif by_mtu:
        least, largest = min(by_mtu), max(by_mtu)
        seen = "; ".join(
            f"MTU {mtu} on {', '.join(f'{node} {interface}' for node, interface in where)}"
            for mtu, where in sorted(by_mtu.items())
        )
        changes = "; ".join(
            f"`sudo ip link set {interface} mtu {least}` on {node}"
            for mtu, where in by_mtu.items()
            for node, interface in where
            if mtu != least
        )
        report.fail(
            "same MTU",
            f"MTUs differ ({seen}): packets larger than {least} bytes are lost on the way to the others",
            f"{changes}; or give all, and the switch between, {largest}",
        )
    return report.findings


def _check_address(report: Reporter, facts: NetworkFacts, has_peers: bool) -> None:
    listed = (
        "; ".join(_describe(each) for each in facts.interfaces if each.kind != "loopback") or "none but the loopback"
    )
    if facts.error:
        (report.fail if has_peers else report.warn)(
            "address", facts.error, _choose(facts) or f"one of: {listed}; say it with SHOAL_HOST_IP"
        )
        return
    used = _used(facts)
    if used is None or used.kind == "loopback":
        seen = f"this machine has no address that others can reach ({facts.address}); interfaces: {listed}"
        if has_peers:
            report.fail("address", seen, "bring an interface up: `ip address`, `sudo ip link set NAME up`")
        else:
            report.ok("address", seen)
        return
    report.ok("address", f"{facts.address} on {_describe(used)}, {facts.why}; of: {listed}")
    if 0 < used.speed_mbits < _SLOW_MBITS:
        report.warn(
            "speed",
            f"{used.name} runs at {used.speed_mbits} Mbit/s",
            f"look at the cable and `ethtool {used.name}`; 10000 and more is usual between machines of one model",
        )


def _check_ways(report: Reporter, facts: NetworkFacts) -> None:
    """What a connection to the head from each address came to."""
    if not facts.ways:
        return
    good = [way for way in facts.ways if way.state in _ANSWERS]
    bad = [way for way in facts.ways if way.state not in _ANSWERS]
    mine = next((way for way in facts.ways if way.address == facts.address), None)
    tried = "; ".join(f"{way.interface} ({way.address}) {_outcome(way.state)}" for way in facts.ways)
    if mine is not None and mine in bad and good:
        variable = facts.named.partition("=")[0]
        better = f"export SHOAL_HOST_IP={good[0].address}"
        if variable.endswith("IFNAME"):
            better = f"export {variable}={good[0].interface}"
        report.fail(
            "route",
            f"the head {facts.head} does not answer on {mine.interface} ({mine.address}), which this machine would use "
            f"({facts.why}), and does on {good[0].interface} ({good[0].address})",
            better,
        )
    elif good:
        # One interface that leads elsewhere is usual; it is worth a word where it could be taken for the right one.
        report.ok("route", f"the way to the head {facts.head}: {tried}")
    elif any(way.state == "dropped" for way in bad):
        report.fail(
            "route",
            f"the head {facts.head} does not answer: {tried}",
            "is the head up, is that its address, and does a firewall between let its port through?",
        )
    else:
        report.fail(
            "route",
            f"no interface of this machine leads to the head {facts.head}: {tried}",
            "`ip route` shows the routes",
        )


def _check_variables(report: Reporter, facts: NetworkFacts) -> None:
    nccl, gloo = (facts.variables.get(name, "") for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"))
    names = [each.name for each in facts.interfaces]
    better = _outward(facts)
    are_valid = bool(nccl and gloo)
    for variable, value in (("NCCL_SOCKET_IFNAME", nccl), ("GLOO_SOCKET_IFNAME", gloo)):
        wanted = [name.strip() for name in value.lstrip("^=").split(",") if name.strip()]
        unknown = [name for name in wanted if not any(each.startswith(name) for each in names)]
        if unknown and not value.startswith("^") and len(unknown) == len(wanted):
            are_valid = False
            report.fail(
                "variables",
                f"{variable}={value} names no interface of this machine; there are {', '.join(names)}",
                f"export {variable}={better}, or unset it" if better else f"unset {variable}",
            )
    if are_valid and nccl.lstrip("=") != gloo:
        report.warn(
            "variables",
            f"NCCL_SOCKET_IFNAME={nccl} and GLOO_SOCKET_IFNAME={gloo} differ: tensors and set-up take different ways",
            f"export NCCL_SOCKET_IFNAME={better} GLOO_SOCKET_IFNAME={better}" if better else "unset both",
        )


def _check_rdma(report: Reporter, facts: NetworkFacts) -> None:
    is_off = facts.variables.get("NCCL_IB_DISABLE", "0") not in ("", "0")
    devices = ", ".join(facts.rdma_devices)
    if not devices:
        report.ok("transport", "TCP: there is no InfiniBand or RoCE device")
    elif is_off:
        report.warn(
            "transport",
            f"TCP, since NCCL_IB_DISABLE={facts.variables['NCCL_IB_DISABLE']}, though there is {devices}",
            "unset NCCL_IB_DISABLE to let NCCL use RDMA",
        )
    else:
        report.ok("transport", f"RDMA over {devices} for NCCL; NCCL_IB_DISABLE=1 takes TCP")


def _choose(facts: NetworkFacts) -> str:
    """The variable that would let this machine's address be found, with the interface that is likely meant."""
    good = [way for way in facts.ways if way.state in _ANSWERS]
    if good:
        variable = facts.named.partition("=")[0]
        if variable.endswith("IFNAME"):
            return f"export {variable}={good[0].interface}"
        return f"export SHOAL_HOST_IP={good[0].address}"
    candidates = [each for each in facts.interfaces if each.kind != "loopback" and each.addresses]
    candidates.sort(key=lambda each: (each.kind != "physical", -each.speed_mbits))
    return f"export SHOAL_HOST_IP={candidates[0].addresses[0]} (on {candidates[0].name})" if candidates else ""


def _outward(facts: NetworkFacts) -> str:
    """The interface in use, or the first, that is no loopback; "" where there is none."""
    outward = [each for each in facts.interfaces if each.kind != "loopback" and each.addresses]
    return next((each.name for each in outward if each.name == facts.interface), outward[0].name if outward else "")


def _used(facts: NetworkFacts) -> InterfaceFacts | None:
    return next((each for each in facts.interfaces if facts.address in each.addresses), None)


def _describe(interface: InterfaceFacts) -> str:
    speed = f", {interface.speed_mbits} Mbit/s" if interface.speed_mbits else ""
    return f"{interface.name} ({', '.join(interface.addresses) or 'no address'}, MTU {interface.mtu}{speed})"


def _outcome(state: str) -> str:
    return {
        "open": "leads there",
        "refused": "leads there, where nothing listens",
        "dropped": "gets no answer",
        "unreachable": "has no route",
    }.get(state, state)
