"""Before a node joins: whether it and the head reach each other by all ports that a cluster needs. `node` calls it.

The usual first failure is a firewall that lets port 6379 through and nothing else: Ray then starts, and hangs.
"""

from __future__ import annotations

import time

from shoal import network
from shoal.cluster import reach
from shoal.cluster.daemon import client
from shoal.cluster.daemon.heart import answering_echoes, echo
from shoal.cluster.daemon.node_services import PROBE, ProbeRequest
from shoal.cluster.ports import NodePorts, Port, needed_between_nodes
from shoal.errors import NodeError, StartupError

# A daemon, or Ray's part, that is started again is not there for a moment.
_AGAIN_SECONDS = 5.0
_BACK_SECONDS = 10.0
# Nobody listens there before a worker runs.
_EMPTY = ("workers",)

_State = tuple[Port, int, str]


def check_ports(head: str, address: str, token: str, ports: NodePorts) -> None:
    """Raises StartupError: which ports are in the way, and whether packets are dropped or refused; NodeError where the
    head's daemon does not take the token, or is of another version."""
    head_address = network.split_endpoint(head)[0]
    there = _try_head(head_address, address, token, ports)
    missing = reach.describe(there, f"the head, from this machine ({address})")
    daemon_is_open = all(state == reach.OPEN for port, _, state in there if port.name == "daemon")
    back: list[_State] = []
    if daemon_is_open:
        back = _try_back(network.format_endpoint(head_address, ports.daemon), address, token, ports)
    missing_back = reach.describe(back, f"this machine ({address}), from the head")
    if back and not missing and all(state != reach.OPEN for _, _, state in back):
        raise StartupError(
            f"the head at {head} does not reach it at {address}: no port of this machine answers it. Is that the right "
            "one of this machine's addresses (--node-ip, SHOAL_HOST_IP, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME "
            f"choose), and do firewalls let the head connect to it? This machine has: {network.format_interfaces()}"
        )
    if missing or missing_back:
        untried = "" if daemon_is_open else " The way back was not tried: the head's daemon does it."
        raise StartupError(
            f"the head at {head} answers, but these ports that the nodes of a cluster need do not: "
            f"{'; '.join(filter(None, (missing, missing_back)))}. {_advice([*there, *back])}{untried} "
            "docs/ports.md has all ports"
        )


def _try_head(head_address: str, address: str, token: str, ports: NodePorts) -> list[_State]:
    wanted = needed_between_nodes(ports, is_head=True)
    deadline = time.monotonic() + _AGAIN_SECONDS
    while True:
        numbers = [(port, number) for port in wanted if port.protocol == "tcp" for number in reach.sample(port)]
        found = reach.probe_all((head_address, number) for _, number in numbers)
        states = [(port, number, _judge(port, found[head_address, number])) for port, number in numbers]
        for port in wanted:
            if port.protocol == "udp":
                state = echo(head_address, port.first, token, timeout=reach.TIMEOUT_SECONDS)
                states.append((port, port.first, state))
        if all(state != reach.REFUSED for _, _, state in states) or time.monotonic() >= deadline:
            return states
        time.sleep(0.5)


def _try_back(endpoint: str, address: str, token: str, ports: NodePorts) -> list[_State]:
    """What the head finds of the ports of this node, where something listens meanwhile."""
    wanted = needed_between_nodes(ports, is_head=False)
    tcp = [number for port in wanted if port.protocol == "tcp" for number in reach.sample(port)]
    udp = [port.first for port in wanted if port.protocol == "udp"]
    host = reach.ANY_IPV6 if ":" in address else reach.ANY_IPV4
    with reach.listening(host, tcp), answering_echoes(host, udp[0], token):
        try:
            answer = client.ask(endpoint, token, PROBE, ProbeRequest(address, tcp, udp), timeout=_BACK_SECONDS)
        except NodeError as error:
            if error.reason in ("token", "version"):
                raise
            raise StartupError(f"the head's daemon did not try the way back: {error}") from error
    return [
        (port, number, (answer.tcp if port.protocol == "tcp" else answer.udp)[number])
        for port in wanted
        for number in reach.sample(port)
    ]


def _judge(port: Port, state: str) -> str:
    """A refusal of a port on which nobody listens yet says that packets come and go."""
    return reach.OPEN if port.name in _EMPTY and state == reach.REFUSED else state


def _advice(states: list[_State]) -> str:
    kinds = {state for _, _, state in states}
    parts = []
    if reach.DROPPED in kinds:
        parts.append(
            "Dropped means that a firewall on the way swallows the packets: open these ports between all nodes."
        )
    if reach.REFUSED in kinds:
        parts.append(
            "Refused means that nothing listens there (is the head of the same Shoal, and did its node start well?), "
            "or that a firewall rejects it."
        )
    if reach.UNREACHABLE in kinds:
        parts.append("Unreachable means that there is no way to that address from there.")
    return " ".join(parts)
