"""Checks of the ways between machines: delay, loss, the largest packet, bandwidth."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from shoal.cluster.doctor.facts import LOST, STALLS, LinkFacts
from shoal.cluster.doctor.findings import Finding, Reporter

GROUP = "links"
_WARN_TRIP_SECONDS = 0.002
_FAIL_TRIP_SECONDS = 0.05
_WARN_LOSS = 0.01
_FAIL_LOSS = 0.025
_WARN_BYTES_PER_S = 110e6  # what a gigabit carries
_LOOK = (
    "look at cable, port and switch: `ip -s link` and `ethtool -S` count errors and drops; `tc qdisc show` and "
    "`nft list ruleset` what drops on purpose"
)
# A way that is so much slower than most has something wrong with it.
_SLOW_SHARE = 1 / 3


def check(links: Sequence[LinkFacts], names: Mapping[str, str]) -> list[Finding]:
    """names: of nodes, by address."""
    findings = []
    usual = _usual_rate(links)
    for link in links:
        source, target = (names.get(address, address) for address in (link.source, link.target))
        report = Reporter(GROUP, f"{source} → {target}")
        _check_delay(report, link)
        _check_loss(report, link, target)
        _check_packets(report, link, target)
        _check_bandwidth(report, link, usual)
        if link.error:
            report.fail("link", link.error, _mend(link, source, target))
        elif not report.findings:
            report.ok("link", _describe(link))
        findings += report.findings
    return findings


def _mend(link: LinkFacts, source: str, target: str) -> str:
    """Of a measurement that did not come to its end."""
    if STALLS in link.error:
        return f"`sudo ip link set INTERFACE mtu {link.largest_packet or 1500}` on both ends"
    if LOST in link.error:
        return _LOOK
    return (
        f"let {target} take all ports from {source}: `sudo ufw allow from {link.source}`, or the like; ranks meet at "
        "any free port"
    )


def outliers(links: Sequence[LinkFacts]) -> list[LinkFacts]:
    """Ways that are much slower than most; another process's moment may have been why."""
    usual = _usual_rate(links)
    return [link for link in links if _is_slow(link.bandwidth_bytes_per_s, usual)]


def _usual_rate(links: Sequence[LinkFacts]) -> float:
    """Bytes/s; 0 where none was measured."""
    rates = [link.bandwidth_bytes_per_s for link in links if link.bandwidth_bytes_per_s]
    return statistics.median(rates) if rates else 0.0


def _is_slow(rate: float, usual: float) -> bool:
    return 0 < rate < usual * _SLOW_SHARE


def _describe(link: LinkFacts) -> str:
    said = [f"round trip {format_seconds(link.round_trip_seconds)}"]
    if link.bandwidth_bytes_per_s:
        said.append(f"{format_rate(link.bandwidth_bytes_per_s)} in one TCP stream")
    if link.num_arrived:
        lost = 1 - link.num_arrived / link.num_sent
        said.append(f"{lost:.1%} of {link.num_sent} packets lost")
    if link.largest_packet:
        said.append(f"packets up to {link.largest_packet} bytes")
    return ", ".join(said)


def _check_delay(report: Reporter, link: LinkFacts) -> None:
    trip = link.round_trip_seconds
    if trip <= _WARN_TRIP_SECONDS:
        return
    seen = f"a round trip takes {format_seconds(trip)}; each token of a model that spans both waits for it, often twice"
    mend = (
        "machines of one model belong into one switch's reach (0.1 to 0.5 ms): `tracepath` shows the way; "
        "`tc qdisc show` a delay that was set. Else let each hold a model of its own, behind `shoal router`"
    )
    (report.fail if trip > _FAIL_TRIP_SECONDS else report.warn)("delay", seen, mend)


def _check_loss(report: Reporter, link: LinkFacts, target: str) -> None:
    if not link.num_sent:
        return
    if not link.num_arrived:
        report.warn(
            "loss",
            f"UDP does not arrive (0 of {link.num_sent}), so loss and packet sizes are not measured, and heartbeats "
            "may not pass",
            f"let {target} take UDP from {link.source}: `sudo ufw allow from {link.source}`",
        )
        return
    lost = 1 - link.num_arrived / link.num_sent
    if lost < _WARN_LOSS:
        return
    seen = (
        f"{lost:.1%} of packets are lost ({link.num_sent - link.num_arrived} of {link.num_sent}): TCP slows to a crawl"
    )
    (report.fail if lost >= _FAIL_LOSS else report.warn)("loss", seen, _LOOK)


def _check_packets(report: Reporter, link: LinkFacts, target: str) -> None:
    if not link.num_arrived or link.largest_packet >= link.mtu:
        return
    if not link.largest_packet:
        report.fail(
            "MTU",
            f"no packet with 'do not fragment' arrives, of {link.mtu} bytes or less: MTUs on the way differ",
            "give all interfaces and switches between the same: `ip link` shows it, `sudo ip link set NAME mtu 1500` "
            "sets it",
        )
        return
    report.fail(
        "MTU",
        f"packets of {link.mtu} bytes, as the interface of {link.source} sends them, do not arrive; of "
        f"{link.largest_packet} they do: MTUs on the way differ, and nobody tells the sender",
        f"`sudo ip link set NAME mtu {link.largest_packet}` for the interface with {link.source}, or MTU {link.mtu} on "
        f"the switch and on {target} too",
    )


def _check_bandwidth(report: Reporter, link: LinkFacts, usual: float) -> None:
    rate = link.bandwidth_bytes_per_s
    if not rate:
        return
    if _is_slow(rate, usual):
        report.warn(
            "bandwidth",
            f"{format_rate(rate)} in one TCP stream, where most ways have {format_rate(usual)}",
            "compare `ethtool`'s Speed and Duplex on both ends with the others'; other traffic on that port",
        )
    elif rate < _WARN_BYTES_PER_S and not report.findings:
        report.warn(
            "bandwidth",
            f"{format_rate(rate)} in one TCP stream: enough for pipeline stages, not for tensor parallelism",
            "use a faster interface (NCCL_SOCKET_IFNAME), keep tensor parallelism inside one machine (-pp between)",
        )


def format_rate(bytes_per_s: float) -> str:
    bits = 8 * bytes_per_s
    return f"{bits / 1e9:.3g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.3g} Mbit/s"


def format_seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
