from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from shoal.router.breaker import FAILURES, FIRST_WAIT, LONGEST_WAIT, BreakerState, CircuitBreaker

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN


def opened(now: float = 0.0) -> CircuitBreaker:
    breaker = CircuitBreaker(Random(1))
    for _ in range(FAILURES):
        breaker.failed(now)
    return breaker


def test_it_opens_after_failures_in_a_row():
    breaker = CircuitBreaker(Random(1))
    for _ in range(FAILURES - 1):
        breaker.failed(0.0)
    assert breaker.allows(0.0)
    breaker.succeeded(0.0)
    for _ in range(FAILURES - 1):
        breaker.failed(0.0)
    assert breaker.allows(0.0)
    breaker.failed(0.0)
    assert not breaker.allows(0.0) and breaker.state(0.0) is OPEN and breaker.num_opened == 1


def test_a_crash_that_ends_many_requests_counts_once():
    breaker = CircuitBreaker(Random(1))
    for began in range(20):
        breaker.failed(20.0 + began / 100, began)
    assert breaker.state(21.0) is CLOSED
    for crash in (30.0, 40.0):
        assert breaker.allows(crash)
        for began in (crash - 1.0, crash - 2.0):
            breaker.failed(crash, began)
    assert breaker.state(40.0) is OPEN


def test_one_trial_decides():
    breaker = opened()
    wait = breaker.seconds_until_trial(0.0)
    assert FIRST_WAIT / 2 <= wait <= FIRST_WAIT
    assert breaker.state(wait) is HALF_OPEN and breaker.allows(wait)
    breaker.started(wait)
    assert not breaker.allows(wait)
    breaker.succeeded(wait)
    assert breaker.allows(wait) and breaker.state(wait) is CLOSED


def test_a_trial_that_fails_makes_the_next_wait_longer():
    breaker, now, waits = opened(), 0.0, []
    for _ in range(10):
        waits.append(breaker.seconds_until_trial(now))
        now += waits[-1]
        breaker.started(now)
        breaker.failed(now)
        assert not breaker.allows(now)
    assert all(later >= earlier for earlier, later in zip(waits, waits[2:], strict=False))
    assert LONGEST_WAIT / 2 <= waits[-1] <= LONGEST_WAIT


def test_a_trial_that_says_nothing_leaves_room_for_another():
    breaker = opened()
    now = breaker.seconds_until_trial(0.0)
    breaker.started(now)
    breaker.undecided(now)
    assert breaker.allows(now)


STEPS = st.lists(
    st.tuples(st.sampled_from(["start", "succeed", "fail", "undecided"]), st.floats(0, 5, allow_nan=False)),
    max_size=60,
)


@given(STEPS, st.integers(0, 99))
def test_whatever_happens(steps, seed):
    """It never lets two trials through, always lets one through in the end, and success closes it."""
    breaker, now, on_trial = CircuitBreaker(Random(seed)), 0.0, False
    for what, seconds in steps:
        now += seconds
        before = breaker.state(now)
        on_trial = on_trial and before is HALF_OPEN
        match what:
            case "start" if breaker.allows(now):
                assert not on_trial
                on_trial = before is HALF_OPEN
                breaker.started(now)
            case "succeed":
                breaker.succeeded(now)
                assert breaker.state(now) is CLOSED and breaker.allows(now)
                on_trial = False
            case "fail":
                breaker.failed(now)
                assert before is CLOSED or not breaker.allows(now) or before is OPEN
                on_trial = False
            case "undecided":
                breaker.undecided(now)
                on_trial = False
        assert breaker.allows(now) is (
            breaker.state(now) is CLOSED or (breaker.state(now) is HALF_OPEN and not on_trial)
        )
        assert 0 <= breaker.seconds_until_trial(now) <= LONGEST_WAIT
    breaker.undecided(now + LONGEST_WAIT)
    assert breaker.allows(now + LONGEST_WAIT)
