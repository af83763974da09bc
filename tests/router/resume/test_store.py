"""What is kept, for how long, and how much of it. Time is a number here."""

from __future__ import annotations

import asyncio

import pytest

from shoal.router.resume.kept import BASE_BYTES, KeptRequest
from shoal.router.resume.store import KeptStore


@pytest.fixture
def store():
    return KeptStore(seconds=10.0, max_requests=3, max_bytes=1_000_000)


def kept(number, owner=None, ended=False):
    one = KeptRequest(("", f"k{number}"), b"", f"r{number}", 1, 2, True, 1000)
    one.owner, one.ended = owner, ended
    return one


def keys(store):
    return [one.key for one in store]


def test_what_nobody_reads_goes_after_its_time(store):
    first, second = kept(1), kept(2)
    store.add(first, 0.0)
    store.add(second, 0.0)
    reader = second.attach(0)
    gone = []
    store.on_gone = gone.append
    store.sweep(10.0)
    assert keys(store) == ["k1", "k2"]
    store.sweep(10.1)
    assert keys(store) == ["k2"] and gone == [first] and first.dropped
    second.detach(reader, 50.0)
    store.sweep(60.0)
    assert keys(store) == ["k2"]
    store.sweep(60.1)
    assert keys(store) == [] and store.num_bytes == 0


def test_what_peers_tell_of_lives_as_long_as_they_do(store):
    store.heard_of("peer", 0.0)
    store.add(kept(1, owner="peer"), 0.0)
    gone = []
    store.on_gone = gone.append
    store.heard_of("peer", 100.0)
    store.sweep(110.0)
    assert keys(store) == ["k1"]
    store.sweep(110.1)
    assert keys(store) == [] and gone == []


def test_the_oldest_that_has_ended_goes_first(store):
    for number, ended in ((1, False), (2, True), (3, True), (4, False)):
        store.add(kept(number, ended=ended), 0.0)
    assert keys(store) == ["k1", "k3", "k4"]
    store.add(kept(5), 0.0)
    store.add(kept(6), 0.0)
    assert keys(store) == ["k4", "k5", "k6"] and store.num_dropped == 3


def test_what_is_read_stays_whatever_the_bounds_say(store):
    all_of_them = [kept(number) for number in range(5)]
    for one in all_of_them:
        one.attach(0)
        store.add(one, 0.0)
    store.sweep(1000.0)
    assert len(store) == 5 and not store.has_room()


async def test_what_is_just_being_taken_over_stays(store):
    one = kept(1)
    store.add(one, 0.0)
    async with one.attaching:
        store.sweep(1000.0)
        assert keys(store) == ["k1"]
    store.sweep(1000.0)
    assert keys(store) == []


def test_bytes_are_bounded(store):
    first, second = kept(1, ended=True), kept(2)
    store.add(first, 0.0)
    store.add(second, 0.0)
    second.resize(999_000)
    assert store.num_bytes == 999_000 + 2 * BASE_BYTES
    store.bound()
    assert keys(store) == [] or keys(store) == ["k2"]
    assert store.num_bytes <= 1_000_000


async def test_the_ring(store):
    """It keeps what was read last, and all that was not read; a reader that is behind holds the answer up."""
    one = kept(1)
    store.add(one, 0.0)
    answer = one.begin_run(None)
    reader = one.attach(0)
    sending = asyncio.create_task(answer.data(b"x" * 1001))
    await asyncio.sleep(0)
    assert not sending.done(), "nobody has read it"
    one.detach(reader, 1.0)
    await sending
    for _ in range(50):
        await answer.data(b"data: 1\nid: k1:1.2\n\n" + b"y" * 100)
    assert 1000 <= store.num_bytes - BASE_BYTES < 3500
    assert one.find("k1:1.2") is not None and one.find(None) is None and one.find("k1:1.22") is None
    store.drop(one)
    assert store.num_bytes == 0
