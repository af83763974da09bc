"""Heartbeats: what a datagram holds, how it is signed, and what a node makes of those it hears. Time is an argument.

A beat proves that its sender lives if it is signed, newer than the last, and names the incarnation of the daemon that
it is for: so what was recorded earlier proves nothing, whatever the clocks say. `heart` sends and receives them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from collections.abc import Iterable

import msgspec

from shoal.cluster.daemon.reports import ALIVE, FLAPPING, LEFT, LOST, PeerReport, RankProgress

BEAT_SECONDS = 0.5
LOST_SECONDS = 3.0
# A node that was back after a silence is shown as flapping for so long.
FLAPPING_SECONDS = 60.0
_LEFT_SECONDS = 600.0
_LOST_FOR_GOOD_SECONDS = 86400.0
# Fits into one packet of every network that carries IPv6, headers counted.
MAX_BYTES = 1200
MAX_PEERS = 1024
_MAX_TEXT, _MAX_VERSIONS = 64, 4
_MAC_BYTES = 16

BEAT, ECHO, ECHOED = "beat", "echo", "echoed"

# The fields of a RankProgress, without their names.
RankLine = tuple[int, int, int, int, str, float]


def rank_lines(ranks: Iterable[RankProgress]) -> list[RankLine]:
    return [(rank.rank, rank.world_size, rank.pid, rank.step, rank.phase, rank.seconds) for rank in ranks]


class Beat(msgspec.Struct, array_like=True):
    """kind: ECHO asks for ECHOED, which says nothing but that datagrams go both ways.

    address: of the sender, its identity. to_incarnation: of the daemon that this is for, as far as the sender has heard
    of it (0: not yet). heard_seconds: since the sender heard it; below 0: never. leaving: the node ends in order.
    num_peers: that the sender knows of. ranks: as many as fit, of `num_ranks`.
    """

    kind: str
    address: str
    hostname: str
    is_head: bool
    incarnation: int
    sequence: int
    to_incarnation: int
    heard_seconds: float
    leaving: bool
    num_peers: int
    versions: dict[str, str]
    num_ranks: int
    ranks: list[RankLine]


def beat_key(token: str) -> bytes:
    return hmac.digest(token.encode(), b"shoal beat", "sha256")


def seal(beat: Beat, key: bytes) -> bytes:
    """The datagram. Ranks that do not fit are left out, those that stand still for longest first to stay."""
    beat = msgspec.structs.replace(
        beat,
        hostname=beat.hostname[:_MAX_TEXT],
        versions={name[:_MAX_TEXT]: value[:_MAX_TEXT] for name, value in list(beat.versions.items())[:_MAX_VERSIONS]},
        ranks=sorted(beat.ranks, key=lambda rank: -rank[-1]),
    )
    data = msgspec.msgpack.encode(beat)
    while len(data) > MAX_BYTES - _MAC_BYTES and beat.ranks:
        spare = (len(data) - MAX_BYTES + _MAC_BYTES) * len(beat.ranks) // len(data) + 1
        beat = msgspec.structs.replace(beat, ranks=beat.ranks[:-spare])
        data = msgspec.msgpack.encode(beat)
    return _mac(data, key) + data


def unseal(datagram: bytes, key: bytes) -> Beat | None:
    """None for anything that was not sealed with this key."""
    if not _MAC_BYTES < len(datagram) <= MAX_BYTES:
        return None
    data = datagram[_MAC_BYTES:]
    if not hmac.compare_digest(datagram[:_MAC_BYTES], _mac(data, key)):
        return None
    try:
        return msgspec.msgpack.decode(data, type=Beat)
    except msgspec.MsgspecError:
        return None  # a node of another version


def _mac(data: bytes, key: bytes) -> bytes:
    return hmac.new(key, data, hashlib.sha256).digest()[:_MAC_BYTES]


@dataclasses.dataclass(frozen=True)
class Peer:
    """What is known of another node. Times are those that `hear` was told. incarnation 0: never heard, only heard of.

    claimed: the newest incarnation that a beat has named, which may be a recorded one; it is answered, not believed.
    """

    known_at: float
    claimed: int = 0
    incarnation: int = 0
    sequence: int = 0
    heard_at: float | None = None
    flapped_at: float | None = None
    num_flaps: int = 0
    num_restarts: int = 0
    left: bool = False

    def state(self, now: float) -> str:
        if self.left:
            return LEFT
        if self.heard_at is None or now - self.heard_at >= LOST_SECONDS:
            return LOST
        if self.flapped_at is not None and now - self.flapped_at < FLAPPING_SECONDS:
            return FLAPPING
        return ALIVE

    def hear(self, beat: Beat, own_incarnation: int, now: float) -> Peer:
        """After a signed beat of this peer. The same object for one that proves nothing new."""
        if beat.to_incarnation != own_incarnation:
            return self if beat.incarnation <= self.claimed else dataclasses.replace(self, claimed=beat.incarnation)
        if (beat.incarnation, beat.sequence) <= (self.incarnation, self.sequence):
            return self
        is_restart = beat.incarnation > self.incarnation
        was_silent = self.heard_at is not None and now - self.heard_at >= LOST_SECONDS
        is_flap = was_silent and not is_restart and not self.left
        return dataclasses.replace(
            self,
            claimed=max(self.claimed, beat.incarnation),
            incarnation=beat.incarnation,
            sequence=beat.sequence,
            heard_at=now,
            flapped_at=now if is_flap else None if is_restart else self.flapped_at,
            num_flaps=self.num_flaps + is_flap,
            num_restarts=self.num_restarts + (is_restart and self.incarnation > 0),
            left=beat.leaving,
        )


@dataclasses.dataclass
class _Entry:
    """The last beat, and when it came: what it says of the peer's ranks ages from then on."""

    peer: Peer
    beat: Beat | None
    hostname: str
    is_head: bool
    shown: str


class PeerTable:
    """All other nodes, by address. Not for several threads."""

    def __init__(self, address: str, incarnation: int) -> None:
        self.address = address
        self.incarnation = incarnation
        self._entries: dict[str, _Entry] = {}

    def addresses(self) -> list[str]:
        """Whom to send beats to: the lost too, that they may come back, who left once it is heard again, and the head
        in any case: started anew, it learns of its nodes by their beats."""
        return [
            address
            for address, entry in self._entries.items()
            if not entry.peer.left or entry.is_head or entry.peer.claimed > entry.peer.incarnation
        ]

    @property
    def num_peers(self) -> int:
        """Without those that have left."""
        return sum(not entry.peer.left for entry in self._entries.values())

    def learn(self, address: str, hostname: str, is_head: bool, now: float) -> None:
        """Somebody says that there is such a node."""
        if address != self.address and address not in self._entries and len(self._entries) < MAX_PEERS:
            self._entries[address] = _Entry(Peer(known_at=now), None, hostname, is_head, LOST)

    def hear(self, beat: Beat, now: float) -> str:
        """Take a signed beat in; returns news for the log, "" where it brings none."""
        if beat.address == self.address:
            return ""
        if beat.to_incarnation > self.incarnation:
            # They know a newer one: this machine's clock was set back between two starts.
            self.incarnation = beat.to_incarnation + 1
            return f"{beat.hostname} knows a later start of this daemon: it goes on as {self.incarnation}"
        self.learn(beat.address, beat.hostname, beat.is_head, now)
        entry = self._entries.get(beat.address)
        if entry is None:
            return ""
        before, peer = entry.peer, entry.peer.hear(beat, self.incarnation, now)
        entry.peer = peer
        if peer.heard_at != now or (peer.incarnation, peer.sequence) == (before.incarnation, before.sequence):
            return ""
        entry.beat, entry.hostname, entry.is_head, entry.shown = beat, beat.hostname, beat.is_head, peer.state(now)
        name = f"{beat.hostname} ({beat.address})"
        if peer.left:
            return "" if before.left else f"{name} has ended in order"
        if before.heard_at is None:
            return f"{name} is there"
        if peer.num_restarts > before.num_restarts:
            return f"{name} was started anew"
        if peer.num_flaps > before.num_flaps:
            return f"{name} is back after {now - before.heard_at:.1f} s of silence"
        return ""

    def look(self, now: float) -> list[str]:
        """News of the passing of time: who was lost. Those that are gone for good are forgotten."""
        news = []
        for address, entry in list(self._entries.items()):
            peer, state = entry.peer, entry.peer.state(now)
            since = peer.known_at if peer.heard_at is None else peer.heard_at
            if now - since > (_LEFT_SECONDS if peer.left else _LOST_FOR_GOOD_SECONDS):
                del self._entries[address]
            elif state == LOST and entry.shown not in (LOST, LEFT):
                news.append(f"{entry.hostname} ({address}) is lost: not heard for {now - since:.1f} s")
            entry.shown = state
        return news

    def beat_for(self, address: str, template: Beat, now: float) -> Beat:
        """`template` with what this node has heard of that peer."""
        peer = self._entries[address].peer
        return msgspec.structs.replace(
            template,
            incarnation=self.incarnation,
            num_peers=self.num_peers,
            to_incarnation=max(peer.claimed, peer.incarnation),
            heard_seconds=-1.0 if peer.heard_at is None else now - peer.heard_at,
        )

    def reports(self, now: float) -> list[PeerReport]:
        return [self._report(address, entry, now) for address, entry in sorted(self._entries.items())]

    @staticmethod
    def _report(address: str, entry: _Entry, now: float) -> PeerReport:
        peer, beat = entry.peer, entry.beat
        age = None if peer.heard_at is None else now - peer.heard_at
        known = beat is not None and beat.heard_seconds >= 0 and age is not None
        return PeerReport(
            address=address,
            hostname=entry.hostname,
            is_head=entry.is_head,
            state=peer.state(now),
            seconds_since_heard=age,
            seconds_since_it_heard_us=beat.heard_seconds + age
            if known and beat is not None and age is not None
            else None,
            incarnation=peer.incarnation,
            num_flaps=peer.num_flaps,
            num_restarts=peer.num_restarts,
            num_peers=beat.num_peers if beat is not None else 0,
            versions=dict(beat.versions) if beat is not None else {},
            num_ranks=beat.num_ranks if beat is not None else 0,
            ranks=[RankProgress(*rank[:-1], seconds=rank[-1] + (age or 0.0)) for rank in beat.ranks]
            if beat is not None
            else [],
        )
