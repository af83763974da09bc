"""Fairness between keys: shares follow weights, whatever is asked, and one with little to ask does not wait long."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.router.admission import AdmissionQueue, Entry, EntryState, QueueLimits

PLENTY = QueueLimits(max_waiting=100_000)


def serve(queue: AdmissionQueue, running: list[Entry], now: float = 0.0) -> list[Entry]:
    """The oldest one ends; those that take its place."""
    admitted = queue.release(running.pop(0), now)
    running += admitted
    return admitted


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2, max_size=4),
    st.lists(st.integers(1, 1000), min_size=4, max_size=40),
    st.integers(1, 3),
    st.integers(1, 7),
)
def test_keys_that_always_wait_get_their_shares(
    weights: list[float], sizes: list[int], capacity: int, step: int
) -> None:
    """The bound of start-time fair queueing, over every interval: |A / a - B / b| <= largest A / a + largest B / b."""
    queue = AdmissionQueue(0, PLENTY)
    for key, weight in enumerate(weights):
        for number in range(120):
            size = sizes[(number * step + key) % len(sizes)]
            queue.offer(Entry(str(key), weight=weight, num_tokens=size), 0.0)
    running = queue.set_capacity(capacity, 0.0)
    served = list(running)
    left = Counter({str(key): 120 for key in range(len(weights))})
    left.subtract(entry.key for entry in running)
    while min(left.values()) > 0:
        admitted = serve(queue, running)
        served += admitted
        left.subtract(entry.key for entry in admitted)
    for one in range(len(weights)):
        for two in range(one):
            differences, difference = [0.0], 0.0
            for entry in served:
                sign = (entry.key == str(one)) - (entry.key == str(two))
                difference += sign * entry.num_tokens / entry.weight
                differences.append(difference)
            bound = max(sizes) / weights[one] + max(sizes) / weights[two]
            assert max(differences) - min(differences) <= bound + 1e-6


def test_one_request_among_a_thousand_is_next() -> None:
    queue = AdmissionQueue(1, PLENTY)
    running = [Entry("greedy", num_tokens=500)]
    queue.offer(running[0], 0.0)
    for _ in range(1000):
        queue.offer(Entry("greedy", num_tokens=500), 0.0)
    for _ in range(10):
        serve(queue, running)
    modest = Entry("modest", num_tokens=2000)
    queue.offer(modest, 0.0)
    order = [serve(queue, running)[0] for _ in range(2)]
    assert modest in order


def test_nothing_is_saved_up_by_not_asking() -> None:
    """A key that comes late gets its share from then on, not the place of all that it did not ask for."""
    queue = AdmissionQueue(1, PLENTY)
    running = [Entry("early")]
    queue.offer(running[0], 0.0)
    for _ in range(300):
        queue.offer(Entry("early"), 0.0)
    for _ in range(200):
        serve(queue, running)
    for _ in range(50):
        queue.offer(Entry("late"), 0.0)
    assert Counter(serve(queue, running)[0].key for _ in range(40)) == {"early": 20, "late": 20}


def test_one_after_the_other_pays_as_well() -> None:
    """A key that has one large request at a time does not get more of the tokens than one with many small ones."""
    queue = AdmissionQueue(1, PLENTY)
    running = [Entry("small", num_tokens=10)]
    queue.offer(running[0], 0.0)
    for _ in range(2000):
        queue.offer(Entry("small", num_tokens=10), 0.0)
    queue.offer(Entry("large", num_tokens=1000), 0.0)
    tokens = Counter[str]()
    while tokens.total() < 10_000:
        (entry,) = serve(queue, running)
        tokens[entry.key] += entry.num_tokens
        if entry.key == "large":
            queue.offer(Entry("large", num_tokens=1000), 0.0)
    assert abs(tokens["large"] - tokens["small"]) <= 1010


def test_who_was_away_has_nothing_to_catch_up() -> None:
    queue = AdmissionQueue(1, PLENTY)
    running = [Entry("away")]
    queue.offer(running[0], 0.0)
    for _ in range(300):
        queue.offer(Entry("there"), 0.0)
    for _ in range(200):
        serve(queue, running)
    for _ in range(50):
        queue.offer(Entry("away"), 0.0)
    assert Counter(serve(queue, running)[0].key for _ in range(40)) == {"away": 20, "there": 20}


def test_a_key_held_back_by_its_own_limit_has_nothing_to_catch_up() -> None:
    queue = AdmissionQueue(4, PLENTY)
    entries = [Entry("limited", max_concurrent=3) for _ in range(99)] + [Entry("free") for _ in range(99)]
    for entry in entries:
        queue.offer(entry, 0.0)
    running = [entry for entry in entries if entry.state is EntryState.ADMITTED]
    assert Counter(entry.key for entry in running) == {"limited": 3, "free": 1}
    held = [entry for entry in running if entry.key == "limited"]
    running = [entry for entry in running if entry.key == "free"]
    for _ in range(40):  # its three requests are long
        assert serve(queue, running)[0].key == "free"
    running += held
    served = Counter(entry.key for _ in range(40) for entry in serve(queue, running))
    assert 17 <= served["free"] <= 23, served
