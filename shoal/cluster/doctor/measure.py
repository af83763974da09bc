"""The near end of a measurement: round trip, lost datagrams, the largest packet and the bandwidth to a responder.

Everything has a deadline, so that a way which swallows packets costs seconds and no more.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
import struct
import time
from collections.abc import Iterable, Sequence

import psutil
from msgspec.structs import replace

from shoal import network
from shoal.cluster.doctor.facts import LOST, STALLS, LinkFacts
from shoal.cluster.doctor.responder import ASK_COUNT, COUNT, HEAD, PING, SINK, SINK_REPLY, SINK_REQUEST, receive

_CONNECT_SECONDS = 3.0
_ANSWER_SECONDS = 3.0
_NUM_PINGS = 12
_PIECE_BYTES = 256 << 10
_DATAGRAM_BYTES = 64
_SMALLEST_PACKET = 576
_LARGEST_PACKET = 65535
_NUM_SIZES = 16
# How often a size of packets is tried; where packets of all sizes are lost, more often.
_NUM_TRIES, _NUM_LOSSY_TRIES = 3, 8
# The share of datagrams from which on it is loss that makes a stream stall.
_LOSSY = 0.05
# linux/in.h, in6.h: send with "don't fragment", whatever is known of the path.
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3
_HEADERS = {socket.AF_INET: 28, socket.AF_INET6: 48}
_MOST_LATE_SECONDS = 1.0


def measure_link(source: str, target: str, port: int, nonce: bytes, *, seconds: float) -> LinkFacts:
    """From this machine's address `source` to the responder at target:port. seconds: for the bandwidth, and about as
    much for the datagrams; 0: neither. `error` of the result says what did not work.
    """
    facts = LinkFacts(source, target, mtu=_mtu(source))
    try:
        trip = _round_trip(source, target, port, nonce)
        facts = replace(facts, round_trip_seconds=trip)
        if seconds <= 0:
            return facts
        with _datagrams(source, target, port) as datagrams:
            sent, answered, train = _send_train(datagrams, nonce, trip, seconds)
            arrived = _count(source, target, port, nonce, train)
            facts = replace(facts, num_sent=sent, num_answered=answered, num_arrived=arrived)
            if arrived:
                num_tries = _NUM_TRIES if answered == sent else _NUM_LOSSY_TRIES
                facts = replace(facts, largest_packet=_largest_packet(datagrams, nonce, trip, facts.mtu, num_tries))
        return replace(facts, bandwidth_bytes_per_s=_bandwidth(source, target, port, nonce, seconds, trip))
    except OSError as error:
        if isinstance(error, TimeoutError) and facts.largest_packet >= facts.mtu:
            # Packets of all sizes pass, so it is no MTU, and no firewall.
            enough = (1 - _LOSSY) * facts.num_sent
            if facts.num_arrived < enough:
                return facts  # the loss says all
            if facts.num_answered < enough:
                return replace(facts, error=f"much of what comes back from {target} is {LOST}")
        return replace(facts, error=_explain(error, target, port))


def _explain(error: OSError, target: str, port: int) -> str:
    where = network.format_endpoint(target, port)
    if isinstance(error, ConnectionRefusedError):
        return f"{where} refuses connections: a firewall rejects them"
    if isinstance(error, TimeoutError):
        if error.errno == errno.ETIMEDOUT:
            return f"{where} does not answer: a firewall drops what comes to such ports"
        return str(error) if STALLS in str(error) else f"{where} takes connections, but most of what is sent is {LOST}"
    return f"{where}: {error.strerror or error}"


def _connect(source: str, target: str, port: int, nonce: bytes, command: bytes) -> socket.socket:
    connection = network.connect(target, port, timeout=_CONNECT_SECONDS, bind=source)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(_ANSWER_SECONDS)
    connection.sendall(nonce + command)
    return connection


def _round_trip(source: str, target: str, port: int, nonce: bytes) -> float:
    """The lower quartile: where packets are lost, the others show as retransmissions."""
    trips: list[float] = []
    with _connect(source, target, port, nonce, PING) as connection:
        deadline = time.monotonic() + 2 * _ANSWER_SECONDS
        try:
            while len(trips) < _NUM_PINGS and time.monotonic() < deadline:
                start = time.perf_counter()
                connection.sendall(b"p")
                receive(connection, 1)
                trips.append(time.perf_counter() - start)
                if sum(trips) > 2.0 and len(trips) >= 8:
                    break
        except TimeoutError:
            if not trips:
                raise
    # The first also waits for the other end's thread.
    return sorted(trips[1:] or trips)[len(trips) // 4]


def _datagrams(source: str, target: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    datagrams = socket.socket(family, socket.SOCK_DGRAM)
    datagrams.bind((source, 0))
    datagrams.connect((target, port))
    datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    if family == socket.AF_INET:
        datagrams.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
    else:
        datagrams.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
    return datagrams


def _send_train(datagrams: socket.socket, nonce: bytes, trip: float, seconds: float) -> tuple[int, int, int]:
    """Datagrams one millisecond apart: how many were sent and answered, and the train's name at the other end."""
    train, number = secrets.randbits(32), 800 if seconds >= 0.5 else 200
    answered: set[int] = set()
    start = time.monotonic()
    for index in range(number):
        with contextlib.suppress(OSError):  # a refusal of an earlier one
            datagrams.send(HEAD.pack(nonce, train, index).ljust(_DATAGRAM_BYTES, b"\0"))
        _collect(datagrams, train, answered, start + 0.001 * (index + 1) - time.monotonic())
    _collect(datagrams, train, answered, 2 * trip + 0.25, enough=number)
    return number, len(answered), train


def _collect(datagrams: socket.socket, train: int, answered: set[int], seconds: float, enough: int = 1 << 32) -> None:
    """Take answers for so long, or until there are enough."""
    deadline = time.monotonic() + seconds
    while len(answered) < enough and (left := deadline - time.monotonic()) > 0:
        datagrams.settimeout(left)
        try:
            data = datagrams.recv(2048)
        except OSError:
            if time.monotonic() >= deadline:
                return
            time.sleep(min(0.001, left))  # a refusal comes at once
            continue
        if len(data) == HEAD.size:
            _, which, number = HEAD.unpack(data)
            if which == train:
                answered.add(number)


def _count(source: str, target: str, port: int, nonce: bytes, train: int) -> int:
    for tries_left in (1, 0):
        try:
            with _connect(source, target, port, nonce, ASK_COUNT) as connection:
                connection.sendall(COUNT.pack(train))
                return int(COUNT.unpack(receive(connection, COUNT.size))[0])
        except TimeoutError:
            if not tries_left:
                raise
    raise AssertionError("it returned or raised")


def _largest_packet(datagrams: socket.socket, nonce: bytes, trip: float, mtu: int, num_tries: int) -> int:
    """Bytes of the largest IP packet that arrives whole, up to the interface's MTU: three rounds, each a ladder of
    sizes between the largest that was answered and the smallest that was not."""
    headers = _HEADERS[datagrams.family]
    if _arriving(datagrams, nonce, [mtu], headers, trip, num_tries):
        return mtu
    largest, smallest_lost = 0, mtu
    for _ in range(3):
        low = max(largest, _SMALLEST_PACKET)
        step = max(1, (smallest_lost - low) // (_NUM_SIZES + 1))
        sizes = sorted({*range(low, smallest_lost, step), *(s for s in (1280, 1400, 1500) if low < s < smallest_lost)})
        if not sizes:
            break
        arrived = _arriving(datagrams, nonce, sizes, headers, trip, num_tries)
        largest = max([largest, *arrived])
        smallest_lost = min((size for size in sizes if size > largest), default=smallest_lost)
    return largest


def _arriving(
    datagrams: socket.socket, nonce: bytes, sizes: Sequence[int], headers: int, trip: float, num_tries: int
) -> list[int]:
    """Which sizes of IP packets were answered; each is tried until it is, `num_tries` times at most."""
    train, answered = secrets.randbits(32), set[int]()
    for _ in range(num_tries):
        for size in sizes:
            if size not in answered:
                with contextlib.suppress(OSError):  # larger than the interface takes
                    datagrams.send(HEAD.pack(nonce, train, size).ljust(size - headers, b"\0"))
        _collect(datagrams, train, answered, min(trip + 0.15, _MOST_LATE_SECONDS), enough=len(sizes))
        if len(answered) == len(sizes):
            break
    return sorted(answered)


def _bandwidth(source: str, target: str, port: int, nonce: bytes, seconds: float, trip: float) -> float:
    """Bytes a second of one TCP stream, as the other end saw them."""
    piece = memoryview(bytes(_PIECE_BYTES))
    # A connection over a long way takes some round trips to find its speed.
    seconds = seconds + min(10 * trip, 1.0)
    with _connect(source, target, port, nonce, SINK) as connection:
        # What is unsent when all is known is thrown away.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(SINK_REQUEST.pack(seconds))
        deadline = time.monotonic() + seconds
        with contextlib.suppress(TimeoutError):
            while (left := deadline - time.monotonic()) > 0:
                connection.settimeout(left)
                connection.send(piece)
        connection.settimeout(_ANSWER_SECONDS + 2 * trip)
        try:
            total, rate = SINK_REPLY.unpack(receive(connection, SINK_REPLY.size))
        except TimeoutError:
            raise TimeoutError(_stalls(target)) from None
    if total < _PIECE_BYTES and rate * seconds < _PIECE_BYTES:
        raise TimeoutError(_stalls(target))
    return float(rate)


def _stalls(target: str) -> str:
    return f"a stream to {target} {STALLS}, though small packets arrive: large ones are lost on the way (MTU)"


def _mtu(address: str) -> int:
    stats = psutil.net_if_stats()
    names: Iterable[str] = (each.name for each in network.interfaces() if each.address == address)
    return min(next((stats[name].mtu for name in names if name in stats), 1500), _LARGEST_PACKET)
