"""Heartbeats without sockets: what is believed, and what follows from silence. Time and the network are the test's."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.daemon.beats import (
    BEAT,
    FLAPPING_SECONDS,
    LOST_SECONDS,
    MAX_BYTES,
    Beat,
    Peer,
    PeerTable,
    beat_key,
    rank_lines,
    seal,
    unseal,
)
from shoal.cluster.daemon.reports import ALIVE, FLAPPING, LEFT, LOST, RankProgress

KEY = beat_key("a-token-of-this-test")


def a_beat(**fields):
    whole = dict(
        kind=BEAT, address="10.0.0.2", hostname="node2", is_head=False, incarnation=7, sequence=1, to_incarnation=5,
        heard_seconds=0.1, leaving=False, num_peers=1, versions={"shoal": "1"}, num_ranks=0, ranks=[],
    )  # fmt: skip
    return Beat(**{**whole, **fields})


def a_rank(number):
    return rank_lines([RankProgress(number, 64, 100_000 + number, 123_456, "forward", float(number))])[0]


@given(num_ranks=st.integers(0, 300), name=st.text(max_size=300), versions=st.dictionaries(st.text(), st.text()))
def test_a_datagram_fits_into_a_packet_and_comes_out_as_it_was(num_ranks, name, versions):
    ranks = [a_rank(number) for number in range(num_ranks)]
    beat = a_beat(hostname=name, ranks=ranks, num_ranks=num_ranks, versions=versions)
    datagram = seal(beat, KEY)
    assert len(datagram) <= MAX_BYTES
    opened = unseal(datagram, KEY)
    assert opened is not None and opened.num_ranks == num_ranks
    assert opened.hostname == name[:64]
    # Those that stand still for longest are there, and no fewer than fit.
    assert opened.ranks == [a_rank(number) for number in reversed(range(num_ranks))][: len(opened.ranks)]
    assert len(opened.ranks) == num_ranks or len(datagram) > MAX_BYTES - 60


@given(position=st.integers(0), flip=st.integers(1, 255))
def test_a_changed_datagram_is_none(position, flip):
    datagram = bytearray(seal(a_beat(), KEY))
    datagram[position % len(datagram)] ^= flip
    assert unseal(bytes(datagram), KEY) is None


@given(st.binary(max_size=2 * MAX_BYTES))
def test_anything_else_is_none(data):
    assert unseal(data, KEY) is None


def test_another_token_and_another_format_are_none():
    assert unseal(seal(a_beat(), beat_key("another-token-than-that")), KEY) is None
    import hashlib
    import hmac

    data = msgspec.msgpack.encode(["beat", 1])  # signed well, of another version
    assert unseal(hmac.new(KEY, data, hashlib.sha256).digest()[:16] + data, KEY) is None


def heard(peer: Peer, now: float, **fields) -> Peer:
    return peer.hear(a_beat(**fields), 5, now)


def test_a_peer_is_alive_lost_and_flapping_by_the_clock():
    peer = Peer(known_at=0.0)
    assert peer.state(0.0) == LOST  # not heard yet
    peer = heard(peer, 1.0)
    assert [peer.state(1.0 + age) for age in (0.0, 2.9, LOST_SECONDS)] == [ALIVE, ALIVE, LOST]
    back = heard(peer, 11.0, sequence=2)
    assert back.state(11.0) == FLAPPING and back.num_flaps == 1 and back.num_restarts == 0
    assert back.state(13.0) == FLAPPING and back.state(14.0) == LOST
    for second in range(int(FLAPPING_SECONDS) + 1):
        back = heard(back, 11.0 + second, sequence=3 + second)
    assert back.state(11.0 + FLAPPING_SECONDS) == ALIVE and back.num_flaps == 1


def test_a_restart_is_no_flap():
    peer = heard(heard(Peer(known_at=0.0), 1.0), 11.0, incarnation=8, sequence=1)
    assert peer.state(11.0) == ALIVE and (peer.num_flaps, peer.num_restarts) == (0, 1)
    flapped = heard(peer, 20.0, incarnation=8, sequence=2)
    assert flapped.state(20.0) == FLAPPING
    assert heard(flapped, 21.0, incarnation=9).state(21.0) == ALIVE  # another process: what flapped is gone


def test_who_leaves_has_left_until_it_starts_anew():
    peer = heard(heard(Peer(known_at=0.0), 1.0), 1.5, sequence=2, leaving=True)
    assert peer.state(1.5) == peer.state(100.0) == LEFT
    assert heard(peer, 2.0, sequence=1) is peer  # overtaken on the way
    again = heard(peer, 50.0, incarnation=8)
    assert again.state(50.0) == ALIVE and (again.num_flaps, again.num_restarts) == (0, 1)


beats = st.builds(
    a_beat,
    incarnation=st.integers(1, 4),
    sequence=st.integers(1, 6),
    to_incarnation=st.integers(3, 6),
    leaving=st.booleans(),
)


@given(st.lists(st.tuples(beats, st.floats(0, 10)), max_size=30))
def test_only_newer_beats_for_this_very_daemon_prove_life(steps):
    """And counters never fall, whatever comes: also what was recorded, and in any order."""
    peer, now = Peer(known_at=0.0), 0.0
    for beat, wait in steps:
        now += wait
        after = peer.hear(beat, 5, now)
        is_new = (beat.incarnation, beat.sequence) > (peer.incarnation, peer.sequence)
        if beat.to_incarnation == 5 and is_new:
            assert after.heard_at == now and after.left == beat.leaving
            assert after.state(now) in ((LEFT,) if beat.leaving else (ALIVE, FLAPPING))
            assert after.num_restarts - peer.num_restarts == (0 < peer.incarnation < beat.incarnation)
        else:
            assert (after.heard_at, after.state(now)) == (peer.heard_at, peer.state(now))
        assert after.num_flaps - peer.num_flaps in (0, 1) and after.claimed >= peer.claimed
        assert after.hear(beat, 5, now + 1.0) is after or beat.to_incarnation == 5 and not is_new
        peer = after


@given(st.lists(st.floats(0.01, 20), min_size=1, max_size=30))
def test_flaps_are_the_silences(waits):
    peer, now, silences = Peer(known_at=0.0), 0.0, 0
    peer = heard(peer, now)
    for number, wait in enumerate(waits, start=2):
        silences += now + wait - now >= LOST_SECONDS
        now += wait
        peer = heard(peer, now, sequence=number)
    assert peer.num_flaps == silences and peer.num_restarts == 0


class Wire:
    """Two tables that send each other beats."""

    def __init__(self) -> None:
        self.tables = {"10.0.0.1": PeerTable("10.0.0.1", 100), "10.0.0.2": PeerTable("10.0.0.2", 200)}
        self.sequences = {address: 0 for address in self.tables}
        self.sent: list[Beat] = []

    def beat(self, source: str, target: str, now: float, **fields) -> str:
        self.sequences[source] += 1
        table = self.tables[source]
        table.learn(target, target, False, now)
        beat = table.beat_for(target, a_beat(address=source, hostname=source, sequence=self.sequences[source]), now)
        beat = msgspec.structs.replace(beat, **fields)
        self.sent.append(beat)
        return self.tables[target].hear(beat, now)

    def states(self, now: float) -> dict[str, str]:
        return {address: table.reports(now)[0].state for address, table in self.tables.items()}


def test_two_that_meet_believe_each_other_after_one_round():
    wire = Wire()
    a, b = wire.tables
    assert wire.beat(a, b, 0.0) == ""  # b has heard of a, but that may be a recording
    assert wire.states(0.0)[b] == LOST
    assert wire.beat(b, a, 0.1) == f"{b} ({b}) is there"  # a named b's answer to itself
    assert wire.beat(a, b, 0.5) == f"{a} ({a}) is there"
    assert wire.states(0.5) == {a: ALIVE, b: ALIVE}
    report = wire.tables[a].reports(0.6)[0]
    assert report.seconds_since_heard == pytest.approx(0.5) and report.incarnation == 200


def test_what_ranks_do_ages_with_the_beat_that_told_of_it():
    wire = Wire()
    a, b = wire.tables
    for number in range(4):
        wire.beat(*((a, b) if number % 2 == 0 else (b, a)), number / 2, ranks=[a_rank(3)], num_ranks=9)
    report = wire.tables[a].reports(3.5)[0]
    assert report.num_ranks == 9
    assert report.ranks == [RankProgress(3, 64, 100_003, 123_456, "forward", pytest.approx(5.0))]


def test_what_was_recorded_does_not_raise_the_dead():
    wire = Wire()
    a, b = wire.tables
    for number in range(6):
        wire.beat(*((a, b) if number % 2 == 0 else (b, a)), number / 2)
    recorded = [beat for beat in wire.sent if beat.address == a]
    # b's daemon starts anew, and a is dead: somebody plays back what a said.
    wire.tables[b] = PeerTable(b, 300)
    for beat in recorded:
        assert wire.tables[b].hear(beat, 10.0) == ""
    assert wire.states(10.0)[b] == LOST and wire.tables[b].reports(10.0)[0].seconds_since_heard is None


def test_a_clock_that_was_set_back_is_made_up_for():
    wire = Wire()
    a, b = wire.tables
    for number in range(6):
        wire.beat(*((a, b) if number % 2 == 0 else (b, a)), number / 2)
    wire.tables[a], wire.sequences[a] = PeerTable(a, 50), 0  # started anew, with an older clock
    wire.beat(a, b, 3.0)
    assert "knows a later start" in wire.beat(b, a, 3.1)
    for number in range(4):
        wire.beat(*((a, b) if number % 2 == 0 else (b, a)), 3.5 + number / 2)
    assert wire.states(5.0) == {a: ALIVE, b: ALIVE}
    assert wire.tables[b].reports(5.0)[0].num_restarts == 1


def test_one_way_is_seen_from_both_sides():
    wire = Wire()
    a, b = wire.tables
    for number in range(4):
        wire.beat(*((a, b) if number % 2 == 0 else (b, a)), number / 2)
    for number in range(20):  # what a sends is lost from here on
        wire.beat(b, a, 2.0 + number / 2)
    assert wire.states(11.5) == {a: ALIVE, b: LOST}
    assert wire.tables[a].reports(11.5)[0].seconds_since_it_heard_us == pytest.approx(10.5)


def test_news_is_told_once_and_who_is_gone_is_forgotten():
    wire = Wire()
    a, b = wire.tables
    table = wire.tables[a]
    for number in range(4):
        wire.beat(*((a, b) if number % 2 == 0 else (b, a)), number / 2)
    assert table.look(2.0) == []
    assert table.look(5.0) == [f"{b} ({b}) is lost: not heard for 3.5 s"] and table.look(6.0) == []
    assert wire.beat(b, a, 7.0) == f"{b} ({b}) is back after 5.5 s of silence"
    assert wire.beat(b, a, 7.5, leaving=True) == f"{b} ({b}) has ended in order"
    assert table.addresses() == [] and table.look(20.0) == [] and table.num_peers == 0
    assert wire.beat(b, a, 21.0, incarnation=201, to_incarnation=0) == ""
    assert table.addresses() == [b]  # it is answered, so that it can prove itself
    assert wire.beat(b, a, 21.5, incarnation=201) == f"{b} ({b}) was started anew"
    assert wire.beat(b, a, 22.0, incarnation=201, leaving=True)
    assert table.look(700.0) == [] and table.reports(700.0) == []
