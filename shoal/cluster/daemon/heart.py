"""The daemon's UDP side: sends beats to all other nodes, and hears theirs. One thread; others ask `peers`.

`echo` asks from elsewhere whether datagrams reach a node and come back.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec

from shoal import network
from shoal.cluster.daemon.beats import (
    BEAT,
    BEAT_SECONDS,
    ECHO,
    ECHOED,
    MAX_BYTES,
    Beat,
    PeerTable,
    beat_key,
    rank_lines,
    seal,
    unseal,
)
from shoal.cluster.daemon.local_ranks import LocalRanks
from shoal.cluster.daemon.machine import versions
from shoal.cluster.daemon.reports import PeerReport, RankProgress
from shoal.errors import StartupError
from shoal.log import get_logger

# Of goodbyes, since a datagram may be lost.
_NUM_GOODBYES = 3
_GOODBYE_SECONDS = 0.05
_ECHO_TRIES = 8

logger = get_logger(__name__)


class Heart:
    """Beats from `start` until `stop`, and says there that the node ends in order."""

    def __init__(
        self, address: str, host: str, port: int, token: str, *, is_head: bool, on_news: Callable[[], None]
    ) -> None:
        """address: of the node. host: to listen on. on_news: called after each change of who is there, from the heart's
        thread."""
        self._host, self._port, self._key = host, port, beat_key(token)
        self._on_news = on_news
        self._table = PeerTable(address, time.time_ns())
        self._lock = threading.Lock()
        self._local = LocalRanks()
        self._ranks: list[RankProgress] = []
        self._template = Beat(
            BEAT, address, socket.gethostname(), is_head, 0, 0, 0, 0.0, False, 0, versions(), num_ranks=0, ranks=[]
        )
        self._sequence = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    @property
    def incarnation(self) -> int:
        return self._table.incarnation

    def start(self) -> None:
        """Raises StartupError when the port is taken."""
        self._socket = udp_socket(self._host, self._port)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        for _ in range(_NUM_GOODBYES):
            self._send_beats(time.monotonic(), leaving=True)
            time.sleep(_GOODBYE_SECONDS)
        self._socket.close()

    def learn(self, address: str, hostname: str, is_head: bool) -> None:
        with self._lock:
            self._table.learn(address, hostname, is_head, time.monotonic())

    def peers(self) -> list[PeerReport]:
        with self._lock:
            return self._table.reports(time.monotonic())

    def ranks(self) -> list[RankProgress]:
        """Of this machine, as the last beat told."""
        return self._ranks

    def _run(self) -> None:
        next_beat = time.monotonic()
        while not self._stopping.is_set():
            wait = next_beat - time.monotonic()
            if wait > 0:
                if select.select([self._socket], [], [], wait)[0]:
                    self._hear()
                continue
            now = time.monotonic()
            next_beat = max(next_beat + BEAT_SECONDS, now)
            try:
                self._ranks = self._local.read(now)
            except Exception:  # what a process that dies leaves in /proc is no reason to fall silent
                logger.exception("cannot read what ranks run here")
            # What has come counts before silence does: after this process has stood still, it is all there is.
            self._hear()
            with self._lock:
                news = self._table.look(time.monotonic())
            self._tell(news)
            self._send_beats(now)

    def _hear(self) -> None:
        news = []
        while True:
            try:
                datagram, sender = self._socket.recvfrom(MAX_BYTES + 1)
            except BlockingIOError:
                break
            except OSError:
                continue  # an earlier datagram could not be delivered
            beat = unseal(datagram, self._key)
            if beat is None:
                continue
            if beat.kind == ECHO:
                with contextlib.suppress(OSError):
                    self._socket.sendto(seal(msgspec.structs.replace(beat, kind=ECHOED), self._key), sender)
            elif beat.kind == BEAT:
                with self._lock:
                    news.append(self._table.hear(beat, time.monotonic()))
        self._tell([each for each in news if each])

    def _send_beats(self, now: float, *, leaving: bool = False) -> None:
        self._sequence += 1
        template = msgspec.structs.replace(
            self._template,
            sequence=self._sequence,
            leaving=leaving,
            num_ranks=len(self._ranks),
            ranks=rank_lines(self._ranks),
        )
        with self._lock:
            beats = [(address, self._table.beat_for(address, template, now)) for address in self._table.addresses()]
        for address, beat in beats:
            with contextlib.suppress(OSError):  # no way there, now: silence tells
                self._socket.sendto(seal(beat, self._key), (address, self._port))

    def _tell(self, news: list[str]) -> None:
        for each in news:
            logger.info("%s", each)
        if news:
            self._on_news()


def udp_socket(address: str, port: int) -> socket.socket:
    """Raises StartupError when it is taken."""
    opened = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    opened.setblocking(False)
    try:
        opened.bind((address, port))
    except OSError as error:
        opened.close()
        raise StartupError(
            f"cannot listen for heartbeats on {network.format_endpoint(address, port)}/udp: {error.strerror or error}"
        ) from error
    return opened


def echo(address: str, port: int, token: str, *, timeout: float, bind: str | None = None) -> str:
    """Whether a signed datagram reaches address:port and comes back: "open", "refused", "dropped" or "unreachable"."""
    key, nonce = beat_key(token), secrets.randbits(62) + 1
    question = seal(Beat(ECHO, "", "", False, nonce, 0, 0, 0.0, False, 0, {}, 0, []), key)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as asking:
        try:
            if bind is not None:
                asking.bind((bind, 0))
            asking.connect((address, port))
            for _ in range(_ECHO_TRIES):
                asking.send(question)
                asking.settimeout(timeout / _ECHO_TRIES)
                with contextlib.suppress(TimeoutError):
                    while True:
                        answer = unseal(asking.recv(MAX_BYTES + 1), key)
                        if answer is not None and answer.kind == ECHOED and answer.incarnation == nonce:
                            return "open"
        except ConnectionRefusedError:
            return "refused"
        except OSError:
            return "unreachable"
    return "dropped"


@contextlib.contextmanager
def answering_echoes(address: str, port: int, token: str) -> Iterator[None]:
    """Answer `echo` on a port before the node's own daemon does; where it is taken, that is told later."""
    key, stopping = beat_key(token), threading.Event()
    try:
        answering = udp_socket(address, port)
    except StartupError:
        yield
        return

    def answer() -> None:
        while not stopping.is_set():
            if not select.select([answering], [], [], BEAT_SECONDS)[0]:
                continue
            with contextlib.suppress(OSError):
                datagram, sender = answering.recvfrom(MAX_BYTES + 1)
                beat = unseal(datagram, key)
                if beat is not None and beat.kind == ECHO:
                    answering.sendto(seal(msgspec.structs.replace(beat, kind=ECHOED), key), sender)

    thread = threading.Thread(target=answer, name="echo", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
        answering.close()
