"""Weights and loads: shares that are exact, and the backend with the least to do."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.router.policies.load_bound import RecentWork
from tests.router.policies.views import Counts, backends, policy, request


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_shares_are_exact_over_a_cycle(weights: list[int]) -> None:
    chooser, views = policy("weighted-round-robin"), backends(*weights)
    for _ in range(2):
        picks = Counter(chooser.pick(request(), views) for _ in range(sum(weights)))
        assert [picks[index] for index in range(len(weights))] == weights


def test_turns_are_spread_over_the_cycle() -> None:
    chooser, views = policy("weighted-round-robin"), backends(5, 1, 1)
    assert "".join(views[chooser.pick(request(), views)].key for _ in range(7)) == "aabacaa"


@given(st.lists(st.integers(1, 10), min_size=2, max_size=6), st.data())
def test_nobody_waits_longer_than_a_cycle(weights: list[int], data: st.DataObject) -> None:
    chooser, views = policy("weighted-round-robin"), backends(*weights)
    last = dict.fromkeys(range(len(weights)), -1)
    for number in range(3 * sum(weights)):
        chosen = chooser.pick(request(), views)
        # Smooth: hardly more than its own interval apart.
        assert number - last[chosen] <= 2 * math.ceil(sum(weights) / weights[chosen])
        last[chosen] = number


def test_weights_may_follow_measured_speed() -> None:
    chooser, views = policy("weighted-round-robin", by_speed=True), backends(1, 1, 2)
    assert Counter(chooser.pick(request(), views) for _ in range(4)) == {0: 1, 1: 1, 2: 2}  # nothing measured
    views[0].speed, views[2].speed = 300.0, 100.0  # the second one counts as a mean one: 200
    assert Counter(chooser.pick(request(), views) for _ in range(700)) == {0: 300, 1: 200, 2: 200}
    views[2].speed = 0.0  # stalled: a small part, so that it is measured again
    assert 0 < Counter(chooser.pick(request(), views) for _ in range(700))[2] < 70


@pytest.mark.parametrize(("weights", "expected"), [((1, 1), (10, 10)), ((3, 1), (15, 5))])
def test_least_connections_by_weight(weights: tuple[int, int], expected: tuple[int, int]) -> None:
    counts = Counts(policy("least-connections"), backends(*weights))
    for _ in range(20):
        counts.send(request())
    assert tuple(view.num_running for view in counts.views) == expected


@pytest.mark.parametrize("name", ["least-connections", "least-outstanding-tokens", "prefix-aware", "power-of-two"])
def test_idle_backends_take_turns_by_weight(name: str) -> None:
    counts = Counts(policy(name), backends(3, 1))
    picks = Counter(counts.serve(request()) for _ in range(400))
    assert abs(picks["b"] - 100) <= (35 if name == "power-of-two" else 2), picks


def test_who_was_away_has_no_turns_to_catch_up() -> None:
    counts = Counts(policy("round-robin"), backends(1, 1, 1))
    for _ in range(100):
        counts.send(request(), counts.views[:2])
    assert Counter(counts.send(request()).key for _ in range(30)) == {"a": 10, "b": 10, "c": 10}


def test_recent_work_fades() -> None:
    recent = RecentWork()
    views = backends(1, 1)
    for key in "ab":
        for _ in range(3000):
            recent.add(key, 100)
    of_a, of_b = recent.of(views)
    assert of_a < 0.01 * of_b and recent.mean_request == pytest.approx(100)
    assert of_b == pytest.approx(100 * 2 * 256, rel=0.01)


def test_least_outstanding_tokens_counts_tokens() -> None:
    counts = Counts(policy("least-outstanding-tokens"), backends(1, 1))
    assert counts.send(request(num_prompt_tokens=1000)).key == "a"
    assert [counts.send(request(num_prompt_tokens=100)).key for _ in range(8)] == ["b"] * 8
    views = backends(1, 4)
    views[0].outstanding_tokens, views[1].outstanding_tokens = 100, 300
    assert policy("least-outstanding-tokens").pick(request(), views) == 1
    views[0].speed, views[1].speed = 100.0, 10.0
    assert policy("least-outstanding-tokens", by_speed=True).pick(request(), views) == 0


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=8, unique=True))
def test_power_of_two_never_takes_the_busiest(loads: list[int]) -> None:
    chooser, views = policy("power-of-two"), backends(*[1.0] * len(loads))
    for view, load in zip(views, loads, strict=True):
        view.outstanding_tokens = load
    picks = Counter(chooser.pick(request(), views) for _ in range(200))
    assert loads.index(max(loads)) not in picks
    assert picks.most_common(1)[0][0] == loads.index(min(loads)) or len(loads) > 5
    assert len(picks) > 1  # and not always the same one
