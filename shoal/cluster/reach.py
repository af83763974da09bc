"""Whether a port of another machine can be reached, and if not, what kind of no it is. Joining and the doctor ask it.

A firewall that drops packets is told from one that refuses them: the first lets a connection wait, the second ends it.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from shoal import network
from shoal.cluster.ports import NodePorts, Port
from shoal.errors import StartupError

# OPEN: something listens, and packets go both ways. REFUSED: they do, but nothing listens (or a firewall says no).
# DROPPED: no answer at all. UNREACHABLE: no way there: no route, or nobody has that address.
OPEN, REFUSED, DROPPED, UNREACHABLE = "open", "refused", "dropped", "unreachable"
TIMEOUT_SECONDS = 3.0
ANY_IPV4, ANY_IPV6 = "0.0.0.0", "::"
_NUM_THREADS = 64
_NO_WAY = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EADDRNOTAVAIL)


def probe(address: str, port: int, *, timeout: float = TIMEOUT_SECONDS, bind: str | None = None) -> str:
    """A TCP connection to address:port, closed at once. bind: the address of this machine to come from."""
    try:
        network.connect(address, port, timeout=timeout, bind=bind).close()
        return OPEN
    except (ConnectionRefusedError, ConnectionResetError):
        return REFUSED
    except TimeoutError:
        return DROPPED
    except OSError as error:
        return UNREACHABLE if error.errno in _NO_WAY else DROPPED


def probe_all(
    targets: Iterable[tuple[str, int]], *, timeout: float = TIMEOUT_SECONDS, bind: str | None = None
) -> dict[tuple[str, int], str]:
    """As `probe`, for many at once."""
    wanted = list(dict.fromkeys(targets))
    if not wanted:
        return {}
    with ThreadPoolExecutor(min(len(wanted), _NUM_THREADS), thread_name_prefix="probe") as pool:
        found = pool.map(lambda target: probe(*target, timeout=timeout, bind=bind), wanted)
        return dict(zip(wanted, found, strict=True))


def sample(port: Port) -> list[int]:
    """Numbers that stand for a range: firewalls have rules for ranges, and one that is wrong is wrong at an end."""
    return sorted({port.first, (port.first + port.last) // 2, port.last})


def refuse_taken(ports: NodePorts, address: str, *, is_head: bool, dashboard: bool) -> None:
    """Raise StartupError where a port that this node needs is taken, saying by whom and what can be done."""
    for port in ports.table():
        needed = (port.on == "all" or is_head) and (port.name != "dashboard" or dashboard)
        if port.protocol != "tcp" or port.first != port.last or not needed:
            continue
        way_out = "choose another for the whole cluster with --port of its head"
        if port.name != "head":
            way_out = f"it is this node's for {port.what} (docs/ports.md): end what holds it, or {way_out}"
        for where in (address, ANY_IPV6 if ":" in address else ANY_IPV4):
            network.listen(where, port.first, way_out=way_out).close()


@contextlib.contextmanager
def listening(host: str, numbers: Sequence[int]) -> Iterator[None]:
    """Listen on these ports, as far as they are free, so that another machine can try them before the node is up."""
    with contextlib.ExitStack() as stack:
        for number in numbers:
            with contextlib.suppress(StartupError):
                stack.enter_context(contextlib.closing(network.listen(host, number)))
        yield


def describe(states: Iterable[tuple[Port, int, str]], whose: str) -> str:
    """ "of 10.0.0.1: 6380/tcp (dropped: the node daemon), …" for those that are in the way; "" when none is."""
    found: dict[Port, dict[int, str]] = {}
    for port, number, state in states:
        found.setdefault(port, {})[number] = state
    parts = []
    for port, by_number in found.items():
        kinds = set(by_number.values())
        if len(kinds) == 1:  # a range that is all alike
            by_number = {port.first: kinds.pop()}
            names = {port.first: port.number}
        else:
            names = {number: str(number) for number in by_number}
        for number, state in by_number.items():
            if state != OPEN:
                parts.append(f"{names[number]}/{port.protocol} ({state}: {port.what})")
    return f"of {whose}: {', '.join(parts)}" if parts else ""
