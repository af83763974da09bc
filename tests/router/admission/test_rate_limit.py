"""Limits per minute: never more than they say, and a Retry-After that is enough."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import RateLimitedError
from shoal.router.admission import ApiKey, RateLimits

ARRIVALS = st.lists(st.tuples(st.floats(0, 20), st.integers(1, 400)), min_size=1, max_size=60)


@given(ARRIVALS, st.integers(1, 30), st.integers(100, 2000))
def test_no_window_has_more_than_the_limit_and_what_it_held(arrivals: list, num_requests: int, num_tokens: int) -> None:
    """In any window: at most a full bucket and what flowed in meanwhile, and one request that began with a full one."""
    key = ApiKey(name="k", requests_per_minute=num_requests, tokens_per_minute=num_tokens)
    limits, granted, now = RateLimits(), [], 0.0
    for delay, tokens in arrivals:
        now += delay
        try:
            limits.charge(key, tokens, now)
        except RateLimitedError:
            continue
        granted.append((now, tokens))
    for first in range(len(granted)):
        for last in range(first, len(granted)):
            window = granted[first : last + 1]
            flow = 1 + (granted[last][0] - granted[first][0]) / 60
            assert len(window) <= num_requests * flow + 1e-6
            too_large = max(max(tokens - num_tokens, 0) for _, tokens in window)
            assert sum(tokens for _, tokens in window) <= num_tokens * flow + too_large + 1e-6


@given(ARRIVALS, st.integers(1, 30), st.integers(100, 2000))
def test_whoever_waits_as_told_gets_in(arrivals: list, num_requests: int, num_tokens: int) -> None:
    key = ApiKey(name="k", requests_per_minute=num_requests, tokens_per_minute=num_tokens)
    limits, now = RateLimits(), 0.0
    for delay, tokens in arrivals:
        now += delay
        for attempt in range(3):  # once for each limit
            try:
                limits.charge(key, tokens, now)
                break
            except RateLimitedError as error:
                assert error.retry_after is not None and 0 < error.retry_after < 1000 and attempt < 2
                now += error.retry_after


def test_the_error_says_who_and_what() -> None:
    key = ApiKey(name="alice", requests_per_minute=2, tokens_per_minute=1000)
    limits = RateLimits()
    limits.charge(key, 10, 0.0)
    limits.charge(key, 10, 0.0)
    with pytest.raises(
        RateLimitedError, match="key 'alice' is limited to 2 requests per minute; try again in 30.0 sec"
    ) as caught:
        limits.charge(key, 10, 0.0)
    assert caught.value.retry_after == pytest.approx(30)
    carol = ApiKey(name="carol", tokens_per_minute=1000)
    limits.charge(carol, 900, 0.0)
    with pytest.raises(
        RateLimitedError, match="key 'carol' is limited to 1000 tokens per minute; try again in 24.0 sec"
    ):
        limits.charge(carol, 500, 0.0)
    limits.charge(ApiKey(name="bob", requests_per_minute=2), 10, 0.0)  # nobody pays for another


def test_estimates_are_corrected_once() -> None:
    key = ApiKey(name="k", tokens_per_minute=600)
    limits = RateLimits()
    first, second = limits.charge(key, 300, 0.0), limits.charge(key, 300, 0.0)
    limits.correct(first, 100, 0.0)
    limits.correct(first, 0, 0.0)  # it has been
    limits.charge(key, 200, 0.0)
    limits.correct(second, 900, 0.0)  # a debt of 600: a minute to pay it back
    with pytest.raises(RateLimitedError) as caught:
        limits.charge(key, 1, 30.0)
    assert caught.value.retry_after == pytest.approx(30.1)
    limits.correct(limits.charge(ApiKey(name="free"), 100, 0.0), 5, 0.0)


def test_a_refund_does_not_overfill() -> None:
    key = ApiKey(name="k", tokens_per_minute=100)
    limits = RateLimits()
    limits.correct(limits.charge(key, 100, 0.0), 0, 60.0)
    limits.charge(key, 100, 60.0)
    with pytest.raises(RateLimitedError):
        limits.charge(key, 1, 60.0)


def test_what_is_larger_than_a_minutes_worth_waits_for_a_full_bucket() -> None:
    key = ApiKey(name="k", tokens_per_minute=100)
    limits = RateLimits()
    limits.charge(key, 1000, 0.0)
    with pytest.raises(RateLimitedError) as caught:
        limits.charge(key, 1000, 60.0)
    assert caught.value.retry_after == pytest.approx(540)
    limits.charge(key, 1000, 600.0)


def test_limits_may_change_and_clocks_may_stand() -> None:
    limits = RateLimits()
    limits.charge(ApiKey(name="k", tokens_per_minute=100), 100, 100.0)
    more = ApiKey(name="k", tokens_per_minute=6000)
    with pytest.raises(RateLimitedError) as caught:
        limits.charge(more, 100, 90.0)
    assert caught.value.retry_after == pytest.approx(1)
    limits.charge(more, 100, 101.0)
    limits.charge(ApiKey(name="k", tokens_per_minute=50), 50, 161.0)
    with pytest.raises(RateLimitedError):
        limits.charge(ApiKey(name="k", tokens_per_minute=50), 50, 161.0)
