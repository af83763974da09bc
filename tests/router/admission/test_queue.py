"""The admission queue: its bounds, one end for every entry, order by priority, and what a full queue does."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.router.admission import AdmissionQueue, Entry, EntryState, QueueLimits

WAITING, ENDS = EntryState.QUEUED, (EntryState.RELEASED, EntryState.REFUSED, EntryState.EXPIRED, EntryState.CANCELLED)
MAX_CONCURRENT = {"a": None, "b": 1, "c": 2}
WAITS = (0.0, 2.0, math.inf)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("offer"), st.sampled_from("abc"), st.integers(0, 2), st.integers(0, 60), st.sampled_from(WAITS)
        ),
        st.tuples(st.just("release"), st.integers(0, 99)),
        st.tuples(st.just("cancel"), st.integers(0, 99)),
        st.tuples(st.just("expire")),
        st.tuples(st.just("capacity"), st.integers(0, 4)),
        st.tuples(st.just("close")),
    ),
    max_size=70,
)  # fmt: skip


class Checked:
    """A queue, all entries that it was ever offered, and what must hold of them after every call."""

    def __init__(self, capacity: int, limits: QueueLimits) -> None:
        self.queue = AdmissionQueue(capacity, limits)
        self.entries: list[Entry] = []
        self.now = 0.0

    def of(self, *states: EntryState) -> list[Entry]:
        return [entry for entry in self.entries if entry.state in states]

    def apply(self, operation: tuple) -> None:
        before = {entry: entry.state for entry in self.entries}
        touched: Entry | None = None
        match operation:
            case ("offer", key, priority, num_bytes, max_wait):
                limit = MAX_CONCURRENT[key]
                touched = Entry(key, priority, num_bytes=num_bytes, max_wait=max_wait, max_concurrent=limit)
                self.entries.append(touched)
                changed = self.queue.offer(touched, self.now)
            case ("release", index) if running := self.of(EntryState.ADMITTED):
                touched = running[index % len(running)]
                changed = self.queue.release(touched, self.now)
                assert touched.state is EntryState.RELEASED
            case ("cancel", index) if self.entries:
                touched = self.entries[index % len(self.entries)]
                changed = self.queue.cancel(touched, self.now)
                assert touched.state in ENDS
            case ("expire",):
                changed = self.queue.expire(self.now)
            case ("capacity", capacity):
                changed = self.queue.set_capacity(capacity, self.now)
            case ("close",):
                changed = self.queue.close(self.now)
            case _:
                return
        self.check(before, touched, changed)

    def check(self, before: dict[Entry, EntryState], touched: Entry | None, changed: list[Entry]) -> None:
        queue, waiting, running = self.queue, self.of(WAITING), self.of(EntryState.ADMITTED)
        # Every other entry whose state changed is told, once, and had been waiting; ends are for good.
        others = [entry for entry, state in before.items() if entry.state is not state and entry is not touched]
        assert sorted(map(id, changed)) == sorted(map(id, others))
        assert all(before[entry] is WAITING for entry in changed)
        assert all(entry.state is state for entry, state in before.items() if state in ENDS)
        # Bounds, and the counts that metrics show.
        assert (queue.num_waiting, queue.num_running) == (len(waiting), len(running))
        assert queue.waiting_bytes == sum(entry.num_bytes for entry in waiting) <= queue.limits.max_waiting_bytes
        assert len(waiting) <= queue.limits.max_waiting
        admitted = [entry for entry in running if before.get(entry) is not EntryState.ADMITTED]
        assert not admitted or len(running) <= queue.capacity
        for key, limit in MAX_CONCURRENT.items():
            assert limit is None or sum(entry.key == key for entry in running) <= limit
        # Nobody waits for nothing, and nobody is passed by one of lower priority, or by a later one of its own.
        free = [entry for entry in waiting if not self.is_blocked(entry, running)]
        assert not free or len(running) >= queue.capacity
        for entry in admitted:
            assert all(other.priority >= entry.priority for other in free)
            same = [other for other in waiting if (other.key, other.priority) == (entry.key, entry.priority)]
            assert all(other.number > entry.number for other in same)
            assert 0 <= entry.waited <= entry.max_wait or entry.waited == 0
        for entry in self.entries:
            if entry.state in (EntryState.REFUSED, EntryState.EXPIRED):
                assert 1 <= entry.retry_after <= 60
        deadlines = [entry.deadline for entry in waiting if entry.deadline < math.inf]
        assert queue.next_deadline() == min(deadlines, default=None)

    @staticmethod
    def is_blocked(entry: Entry, running: list[Entry]) -> bool:
        limit = MAX_CONCURRENT[entry.key]
        return limit is not None and sum(other.key == entry.key for other in running) >= limit


@settings(max_examples=300)
@given(
    OPERATIONS,
    st.lists(st.floats(0, 3), min_size=70, max_size=70),
    st.integers(0, 3),
    st.integers(0, 6),
    st.integers(0, 150),
)
def test_every_entry_ends_once_within_all_bounds(
    operations: list[tuple], delays: list[float], capacity: int, max_waiting: int, max_bytes: int
) -> None:
    checked = Checked(capacity, QueueLimits(max_waiting=max_waiting, max_waiting_bytes=max_bytes))
    for operation, delay in zip(operations, delays, strict=False):
        checked.now += delay
        checked.apply(operation)
    checked.apply(("capacity", 3))
    while checked.of(EntryState.ADMITTED):
        checked.apply(("release", 0))
    # With places for all, nothing is left over; nothing of it is remembered either.
    assert all(entry.state in ENDS for entry in checked.entries)
    assert not checked.queue._waiting._levels and not checked.queue._waiting._running


def offered(queue: AdmissionQueue, now: float = 0.0, **fields: object) -> Entry:
    entry = Entry(**fields)
    queue.offer(entry, now)
    return entry


def test_priorities_come_first_and_then_the_order_of_arrival() -> None:
    queue = AdmissionQueue(1)
    running = offered(queue)
    entries = [offered(queue, priority=priority) for priority in (1, 0, 1, -5, 0)]
    order = []
    while queue.num_running:
        admitted = queue.release(running, 0.0)
        if admitted:
            running = admitted[0]
            order.append(entries.index(running))
    assert order == [3, 1, 4, 0, 2]


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    queue = AdmissionQueue(1, QueueLimits(max_waiting=2))
    current = offered(queue)
    for second in range(1, 41):
        queue.release(current, second / 2)  # two a second
        current = offered(queue, second / 2)
    assert [offered(queue, 20.0).state for _ in range(2)] == [WAITING, WAITING]
    refused = offered(queue, 20.0)
    assert refused.state is EntryState.REFUSED
    assert refused.retry_after == pytest.approx(3 / 2, rel=0.15)
    # The longer nothing completes, the longer it will take.
    assert offered(queue, 60.0).retry_after > 5
    assert offered(queue, 4000.0).retry_after == 60


def test_bytes_are_bounded_as_well() -> None:
    queue = AdmissionQueue(0, QueueLimits(max_waiting_bytes=100))
    assert offered(queue, num_bytes=60).state is WAITING
    assert offered(queue, num_bytes=60).state is EntryState.REFUSED
    assert offered(queue, num_bytes=40).state is WAITING
    assert offered(AdmissionQueue(1, QueueLimits(max_waiting_bytes=0)), num_bytes=10**9).state is EntryState.ADMITTED


def test_a_lower_priority_makes_room() -> None:
    queue = AdmissionQueue(0, QueueLimits(max_waiting=2))
    first, second = offered(queue, priority=1), offered(queue, priority=1)
    urgent = Entry(priority=0)
    assert queue.offer(urgent, 0.0) == [second] and second.state is EntryState.REFUSED and second.retry_after > 0
    assert (first.state, urgent.state) == (WAITING, WAITING)
    assert offered(queue, priority=2).state is EntryState.REFUSED


def test_a_key_that_fills_the_queue_makes_room_for_others() -> None:
    queue = AdmissionQueue(0, QueueLimits(max_waiting=10))
    greedy = [offered(queue, key="greedy") for _ in range(10)]
    modest = [offered(queue, key="modest") for _ in range(7)]
    assert [entry.state for entry in modest] == [WAITING] * 5 + [EntryState.REFUSED] * 2
    assert [entry.state for entry in greedy] == [WAITING] * 5 + [EntryState.REFUSED] * 5  # the youngest go
    assert offered(queue, key="greedy").state is EntryState.REFUSED
    heavy = AdmissionQueue(0, QueueLimits(max_waiting=8))
    for _ in range(8):
        offered(heavy, key="one")
        offered(heavy, key="three", weight=3.0)
    assert sum(entry.key == "three" for entry in heavy._waiting) == 6


def test_nobody_makes_room_in_vain() -> None:
    """What does not fit even so takes nobody's place, and all that were looked at keep their order."""
    queue = AdmissionQueue(0, QueueLimits(max_waiting_bytes=100))
    late = [offered(queue, priority=1, num_bytes=10) for _ in range(3)]
    offered(queue, key="other", priority=0, num_bytes=70)
    assert offered(queue, priority=0, num_bytes=90).state is EntryState.REFUSED
    assert offered(queue, priority=0, num_bytes=101).state is EntryState.REFUSED
    assert [entry.state for entry in late] == [WAITING] * 3
    assert queue.set_capacity(4, 0.0)[1:] == late


def test_waiting_too_long() -> None:
    queue = AdmissionQueue(1)
    running = offered(queue)
    short, long = offered(queue, max_wait=2.0), offered(queue, max_wait=9.0)
    assert queue.next_deadline() == 2.0
    assert queue.expire(1.9) == []
    assert queue.expire(2.0) == [short] and short.state is EntryState.EXPIRED and short.retry_after >= 1
    # A place that comes too late is not given to one whose time is over, although nobody called expire.
    assert queue.release(running, 9.5) == [long] and long.state is EntryState.EXPIRED
    assert queue.next_deadline() is None and queue.num_running == 0


def test_deadlines_of_those_that_do_not_wait_any_more_are_dropped() -> None:
    queue = AdmissionQueue(1)
    current = offered(queue)
    for _ in range(2000):
        following = offered(queue, max_wait=1000.0)
        queue.release(current, 0.0)
        current = following
    assert len(queue._deadlines) < 100


def test_closing_refuses_all_but_those_that_run() -> None:
    queue = AdmissionQueue(1)
    running, waiting = offered(queue), offered(queue)
    assert queue.close(0.0) == [waiting] and waiting.state is EntryState.REFUSED
    assert offered(queue).state is EntryState.REFUSED and running.state is EntryState.ADMITTED
    assert queue.release(running, 1.0) == [] and queue.num_running == 0


def test_an_entry_is_offered_once_and_released_once() -> None:
    queue = AdmissionQueue(1)
    entry = offered(queue)
    with pytest.raises(AssertionError):
        queue.offer(entry, 0.0)
    queue.release(entry, 0.0)
    with pytest.raises(AssertionError):
        queue.release(entry, 0.0)
    assert queue.cancel(entry, 0.0) == [] and entry.state is EntryState.RELEASED


def test_a_limit_that_was_raised_counts_for_those_that_come_later() -> None:
    """The first that waits may not go by its key's old limit; when it leaves, those behind it may."""
    queue = AdmissionQueue(9)
    offered(queue, key="k", max_concurrent=1)
    first = offered(queue, key="k", max_concurrent=1)
    second = offered(queue, key="k", max_concurrent=5)
    assert queue.cancel(first, 0.0) == [second] and second.state is EntryState.ADMITTED
    waiting = offered(queue, key="k", max_concurrent=1, max_wait=3.0), offered(queue, key="k", max_concurrent=5)
    assert queue.expire(3.0) == [*waiting]
    assert [entry.state for entry in waiting] == [EntryState.EXPIRED, EntryState.ADMITTED]
