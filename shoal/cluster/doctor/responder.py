"""The far end of a measurement: listens on a port of its own for some seconds, and answers those who know its nonce.

TCP: after the nonce a letter says what comes: P echoes bytes, S swallows a stream and says how fast it came, C tells
how many datagrams of a train arrived. UDP: each datagram is answered by its head. Who knows no nonce learns that the
port is open, and no more.
"""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterable

from shoal import network
from shoal.errors import ShoalError

NONCE_BYTES = 16
# Of a datagram: nonce, train, number.
HEAD = struct.Struct(f">{NONCE_BYTES}sII")
# What a sink answers: bytes, and bytes a second over the later half of the time.
SINK_REPLY = struct.Struct(">Qd")
SINK_REQUEST = struct.Struct(">d")
COUNT = struct.Struct(">I")
PING, SINK, ASK_COUNT = b"P", b"S", b"C"
_BUFFER_BYTES = 1 << 20
_MOST_CONNECTIONS = 32
_MOST_TRAINS = 256
_IDLE_SECONDS = 15.0
_SAMPLE_SECONDS = 0.02
_DRAIN_SECONDS = 1.0
_POLL_SECONDS = 0.2


class Responder:
    """Listens from its constructor until `close`, or until its lifetime is over. Threads of its own do the work."""

    def __init__(self, address: str, *, lifetime: float, tcp: Iterable[int] = ()) -> None:
        """address: to listen on. tcp: more ports, as far as they are free; `open_tcp` says which were.

        Raises StartupError where no port can be opened.
        """
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        self._deadline = time.monotonic() + lifetime
        self._selector = selectors.DefaultSelector()
        self._sockets: list[socket.socket] = []
        self._arrived: dict[int, set[int]] = {}
        self._slots = threading.Semaphore(_MOST_CONNECTIONS)
        self._stopping = threading.Event()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.port = self._open_pair(address, family)
        self.open_tcp = [port for port in tcp if self._open_tcp(address, port)]
        self._thread = threading.Thread(target=self._run, name="doctor-responder", daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()

    def __enter__(self) -> Responder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_pair(self, address: str, family: int) -> int:
        """The same number for TCP and UDP."""
        for _ in range(20):
            listener = network.listen(address, 0)
            port = network.port_of(listener)
            if self._open_udp(address, port, family):
                self._add(listener)
                return port
            listener.close()
        raise ShoalError(f"no port of {address} is free for both TCP and UDP")

    def _open_tcp(self, address: str, port: int) -> bool:
        try:
            self._add(network.listen(address, port))
        except ShoalError:
            return False
        return True

    def _open_udp(self, address: str, port: int, family: int) -> bool:
        datagrams = socket.socket(family, socket.SOCK_DGRAM)
        try:
            datagrams.bind((address, port))
        except OSError:
            datagrams.close()
            return False
        datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        datagrams.setblocking(False)
        self._add(datagrams)
        return True

    def _add(self, each: socket.socket) -> None:
        self._sockets.append(each)
        self._selector.register(each, selectors.EVENT_READ)

    def _run(self) -> None:
        while not self._stopping.is_set() and time.monotonic() < self._deadline:
            for key, _ in self._selector.select(_POLL_SECONDS):
                each = key.fileobj
                assert isinstance(each, socket.socket)
                with contextlib.suppress(OSError):
                    if each.type == socket.SOCK_DGRAM:
                        self._answer_datagrams(each)
                    else:
                        self._take(each.accept()[0])
        self._selector.close()
        for each in self._sockets:
            each.close()

    def _answer_datagrams(self, each: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, sender = each.recvfrom(1 << 16)
                if len(data) < HEAD.size:
                    continue
                nonce, train, number = HEAD.unpack_from(data)
                if not secrets.compare_digest(nonce, self.nonce):
                    continue
                if train in self._arrived or len(self._arrived) < _MOST_TRAINS:
                    self._arrived.setdefault(train, set()).add(number)
                with contextlib.suppress(OSError):
                    each.sendto(data[: HEAD.size], sender)

    def _take(self, connection: socket.socket) -> None:
        if not self._slots.acquire(blocking=False):
            connection.close()
            return
        threading.Thread(target=self._serve, args=(connection,), daemon=True, name="doctor-connection").start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError, struct.error):
                connection.settimeout(_IDLE_SECONDS)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                head = receive(connection, NONCE_BYTES + 1)
                if not secrets.compare_digest(head[:NONCE_BYTES], self.nonce):
                    return
                command = head[NONCE_BYTES:]
                if command == PING:
                    while data := connection.recv(64):
                        connection.sendall(data)
                elif command == SINK:
                    (seconds,) = SINK_REQUEST.unpack(receive(connection, SINK_REQUEST.size))
                    _swallow(connection, min(max(seconds, 0.0), _IDLE_SECONDS))
                elif command == ASK_COUNT:
                    (train,) = COUNT.unpack(receive(connection, COUNT.size))
                    connection.sendall(COUNT.pack(len(self._arrived.get(train, ()))))
        finally:
            self._slots.release()


def receive(connection: socket.socket, size: int) -> bytes:
    """Exactly so many bytes. Raises OSError (TimeoutError, ConnectionError) when they do not come."""
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionError("the connection ended")
        data += piece
    return data


def _swallow(connection: socket.socket, seconds: float) -> None:
    """Read until the sender stops, or `seconds` have passed; say how fast it came, and read on so that this arrives."""
    buffer, total = memoryview(bytearray(_BUFFER_BYTES)), 0
    samples: list[tuple[float, int]] = []
    start = now = time.monotonic()
    # The later half counts: by then a connection has found its speed.
    while (left := start + seconds - now) > 0:
        connection.settimeout(left)
        try:
            size = connection.recv_into(buffer)
        except TimeoutError:
            break
        now = time.monotonic()
        if not samples:
            start = now
        if not size:
            break
        total += size
        if not samples or now - samples[-1][0] >= _SAMPLE_SECONDS:
            samples.append((now, total))
    end = time.monotonic() if total else start
    since, before = next((sample for sample in samples if sample[0] >= start + (end - start) / 2), (start, 0))
    rate = (total - before) / (end - since) if end > since else 0.0
    connection.settimeout(_DRAIN_SECONDS)
    connection.sendall(SINK_REPLY.pack(total, rate))
    connection.shutdown(socket.SHUT_WR)
    deadline = time.monotonic() + _DRAIN_SECONDS
    while time.monotonic() < deadline and connection.recv_into(buffer):
        pass
