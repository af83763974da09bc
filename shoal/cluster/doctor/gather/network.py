"""Interfaces, the address that others are told and why, and from which addresses the head answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from shoal import env, network
from shoal.cluster.doctor.facts import InterfaceFacts, NetworkFacts, WayFacts
from shoal.cluster.doctor.gather.system import rdma_devices
from shoal.cluster.reach import probe
from shoal.errors import ConfigError

_NET = Path("/sys/class/net")
_WAY_SECONDS = 2.0
_VARIABLES = ("NCCL_", "GLOO_", "SHOAL_HOST_IP", "VLLM_HOST_IP")


def gather_network(head: str | None, address: str | None = None, *, timeout: float = _WAY_SECONDS) -> NetworkFacts:
    """head: HOST:PORT to reach, None: none is known. address: of the node that runs here, None: none does.

    timeout: seconds for a connection to the head from each address.
    """
    interfaces = _interfaces()
    named, error, why = network.named_by(), "", ""
    chosen = address or ""
    if address is not None:
        why = "as its node was started"
    else:
        try:
            chosen = network.host_address(network.split_endpoint(head)[0] if head else None)
            why = f"named by {named}" if named else _why_routed(head)
        except ConfigError as trouble:
            error = str(trouble)
    return NetworkFacts(
        interfaces=interfaces,
        address=chosen,
        interface=next((each.name for each in interfaces if chosen in each.addresses), ""),
        why=why,
        named=named,
        error=error,
        head=head or "",
        ways=_ways(head, timeout) if head else [],
        rdma_devices=rdma_devices(),
        variables={name: value for name, value in env.relevant_variables().items() if name.startswith(_VARIABLES)},
    )


def _interfaces() -> list[InterfaceFacts]:
    addresses: dict[str, list[str]] = {}
    for each in network.interfaces():
        addresses.setdefault(each.name, []).append(each.address)
    found = []
    for name, stats in psutil.net_if_stats().items():
        if not stats.isup:
            continue
        own = addresses.get(name, [])
        if name == "lo" or (own and all(network.is_loopback(address) for address in own)):
            kind = "loopback"
        else:
            kind = "physical" if (_NET / name / "device").exists() else "virtual"
        found.append(InterfaceFacts(name, own, stats.mtu, stats.speed if stats.speed < 1 << 24 else 0, kind))
    return found


def _why_routed(head: str | None) -> str:
    return f"which routes to the head {head}" if head else "by the default route, or as the only one"


def _ways(head: str, timeout: float) -> list[WayFacts]:
    """A connection from each of this machine's addresses; the head's own machine needs none."""
    host, port = network.split_endpoint(head)
    try:
        target = network.resolve_head(host)
    except ConfigError:
        return []
    own = network.interfaces()
    if target in {each.address for each in own}:
        return []
    sources = [each for each in own if not each.is_loopback and (":" in each.address) == (":" in target)]
    if not sources:
        return []
    with ThreadPoolExecutor(len(sources)) as pool:
        states = pool.map(lambda each: probe(target, port, timeout=timeout, bind=each.address), sources)
        return [WayFacts(each.address, each.name, state) for each, state in zip(sources, states, strict=True)]
