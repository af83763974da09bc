"""How often a core is started again, and after what wait."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.restart_budget import RestartBudget, RestartLimits


def test_the_waits_grow_and_the_attempts_end() -> None:
    budget = RestartBudget(RestartLimits(9, 600.0))
    assert [budget.take(1.0) for _ in range(10)] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, None]
    assert budget.attempt == 9


def test_never_means_never() -> None:
    assert RestartBudget(RestartLimits(0, 600.0)).take(1e9) is None


def test_a_core_that_ran_for_the_whole_window_leaves_nothing_to_count() -> None:
    budget = RestartBudget(RestartLimits(2, 600.0))
    assert [budget.take(seconds) for seconds in (5.0, 5.0)] == [0.0, 1.0]
    assert budget.take(600.0) == 0.0 and budget.attempt == 1


def test_starts_that_fail_count_however_long_they_take() -> None:
    budget = RestartBudget(RestartLimits(3, 600.0))
    assert [budget.take(seconds) for seconds in (9999.0, 0.0, 0.0, 0.0)] == [0.0, 1.0, 2.0, None]


@given(st.lists(st.floats(0.0, 300.0), max_size=60), st.integers(1, 6))
def test_no_window_of_work_holds_more_attempts_than_allowed(lives: list[float], limit: int) -> None:
    budget, now = RestartBudget(RestartLimits(limit, 600.0)), 0.0
    granted: list[float] = []
    for life in lives:
        now += life
        delay = budget.take(life)
        recent = [at for at in granted if now - at < 600.0]
        assert (delay is None) == (len(recent) >= limit)
        if delay is not None:
            assert delay == (0.0 if not recent else min(2.0 ** (len(recent) - 1), 30.0))
            granted.append(now)
