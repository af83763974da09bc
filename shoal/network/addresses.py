"""Under which address the other machines reach this one. Node commands, launchers and workers ask `host_address`.

No host name of this machine is ever resolved: on many it is 127.0.0.1, which each of the others takes for itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import socket

import psutil

from shoal import env
from shoal.errors import ConfigError

# An address that nobody has (RFC 5737, RFC 3849): connecting a UDP socket sends nothing, it only asks for the route.
_FAR_AWAY = ("192.0.2.1", "2001:db8::1")
_ANY_PORT = 9


@dataclasses.dataclass(frozen=True)
class Interface:
    """One address of one network interface that is up."""

    name: str
    address: str

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.address)


def host_address(head: str | None = None) -> str:
    """The address of this host to give to the others; `head` is the machine they meet at (None: this one).

    SHOAL_HOST_IP decides, else NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, else the route to the head. A loopback address
    comes out only where the head's is one, or where this host has no other. Raises ConfigError: what was found, and
    what would work.
    """
    target = resolve_head(head) if head is not None else None
    address = _explicit_address() or _address_of_named_interface(target) or _routed_address(head, target)
    if target is not None and is_loopback(address) and not is_loopback(target):
        raise ConfigError(
            f"{address} is this machine's own loopback address: the head at {target} cannot reach it. "
            f"{_use_another(target)}"
        )
    return address


def named_by() -> str:
    """The variable that decides in `host_address`, as it is set ("GLOO_SOCKET_IFNAME=eth1"); "" where none does."""
    address, named = env.host_ip(), env.socket_interface()
    if address is not None:
        return f"SHOAL_HOST_IP={address}"
    return "=".join(named) if named is not None else ""


def sends_from(address: str, target: str) -> bool:
    """Whether this machine chooses `address` by itself to send to `target`. Else there may be no way back to it."""
    return _route_to(target) == address


def resolve_head(head: str) -> str:
    """The address of a head named by IP or DNS name. IPv4 counts more where a name has both.

    Raises ConfigError for a name that does not resolve, or that resolves to this machine's loopback.
    """
    head = head.strip("[]")
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(head))
    try:
        found = socket.getaddrinfo(head, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"the name {head} does not resolve on this machine ({error}); give the head's address instead, such as "
            "10.0.0.1"
        ) from error
    addresses = sorted({str(entry[4][0]) for entry in found}, key=lambda address: ":" in address)
    if head != "localhost" and is_loopback(addresses[0]):
        raise ConfigError(
            f"the name {head} resolves to {addresses[0]} on this machine, which is this machine itself (look in "
            "/etc/hosts); give the address under which the others reach the head. This machine has: "
            f"{format_interfaces()}"
        )
    return addresses[0]


def interface_of(address: str) -> str:
    """The name of the interface with this address. Raises ConfigError where none has it, or where it is no address."""
    for interface in interfaces():
        if interface.address == address:
            return interface.name
    try:
        loopback = is_loopback(address)
    except ValueError as error:
        raise ConfigError(f"{address!r} is no IP address; this machine has: {format_interfaces()}") from error
    if loopback:  # all of 127.0.0.0/8 is the loopback's
        return next((interface.name for interface in interfaces() if interface.is_loopback), "lo")
    raise ConfigError(f"no interface of this machine has the address {address}; there are: {format_interfaces()}")


def interfaces() -> list[Interface]:
    """The interfaces that are up, IPv4 before IPv6; link-local addresses, which need a zone, are left out."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        for name, addresses in psutil.net_if_addrs().items():
            for entry in addresses:
                address = entry.address.split("%")[0]
                if entry.family == family and name in up and not ipaddress.ip_address(address).is_link_local:
                    found.append(Interface(name, address))
    return found


def format_interfaces() -> str:
    """ "eth0 10.0.0.4, lo 127.0.0.1": for messages."""
    return ", ".join(f"{interface.name} {interface.address}" for interface in interfaces()) or "none that is up"


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _explicit_address() -> str | None:
    address = env.host_ip()
    if address is None:
        return None
    try:
        ipaddress.ip_address(address)
        interface_of(address)
    except ValueError as error:
        raise ConfigError(
            f"SHOAL_HOST_IP must be an address of this machine; got {address!r}. It has: {format_interfaces()}"
        ) from error
    return address


def _address_of_named_interface(target: str | None) -> str | None:
    """What NCCL_SOCKET_IFNAME, else GLOO_SOCKET_IFNAME, allows; of several the one that routes to the head."""
    named = env.socket_interface()
    if named is None:
        return None
    variable, pattern = named
    allowed = _matching(pattern)
    if target is not None:
        allowed = [each for each in allowed if (":" in each.address) == (":" in target)]
    if not allowed:
        raise ConfigError(
            f"{variable}={pattern} allows no interface of this machine that is up and has an address; set it here (on "
            f"each machine by itself, where they differ) so that it allows one of: {format_interfaces()}"
        )
    routed = _route_to(target) if target is not None else None
    return next((each.address for each in allowed if each.address == routed), allowed[0].address)


def _matching(pattern: str) -> list[Interface]:
    """NCCL's rules: names are prefixes, separated by commas; "=" wants them exact, "^" excludes them, "^=" both.

    The order is that of the names. An exact one counts before those it begins, which suits Gloo's variable too.
    """
    exclude = pattern.startswith("^")
    names = pattern.removeprefix("^")
    exact = names.startswith("=")
    wanted = [name.strip() for name in names.removeprefix("=").split(",") if name.strip()]

    def hit(interface: Interface, name: str) -> bool:
        return interface.name == name or (not exact and interface.name.startswith(name))

    if exclude:
        rest = [each for each in interfaces() if not any(hit(each, name) for name in wanted)]
        return sorted(rest, key=lambda each: each.is_loopback)
    hits = []
    for name in wanted:
        hits += sorted((each for each in interfaces() if hit(each, name)), key=lambda each: each.name != name)
    return hits


def _routed_address(head: str | None, target: str | None) -> str:
    if target is not None:
        address = _route_to(target)
        if address is None:
            raise ConfigError(
                f"this machine has no route to the head at {head}{f' ({target})' if head != target else ''}; it has: "
                f"{format_interfaces()}"
            )
        return address
    for far in _FAR_AWAY:
        address = _route_to(far)
        if address is not None and not is_loopback(address):
            return address
    candidates = [interface for interface in interfaces() if not interface.is_loopback]
    names = {interface.name for interface in candidates}
    if len(names) > 1:
        raise ConfigError(
            "this machine has several networks and no default route, so which one the others use must be said: "
            f"SHOAL_HOST_IP=ADDRESS with one of {', '.join(f'{each.address} ({each.name})' for each in candidates)}"
        )
    return candidates[0].address if candidates else "127.0.0.1"


def _route_to(target: str) -> str | None:
    """The address that the system would send from; None where there is no route."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, _ANY_PORT))
            return str(probe.getsockname()[0])
        except OSError:
            return None


def _use_another(target: str) -> str:
    others = [each for each in interfaces() if not each.is_loopback]
    routed = _route_to(target)
    good = [each for each in others if each.address == routed] or others
    if not good:
        return f"This machine has no other ({format_interfaces()})"
    return f"SHOAL_HOST_IP={good[0].address} (on {good[0].name}) would work; this machine has: {format_interfaces()}"
