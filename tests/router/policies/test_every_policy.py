"""What holds for every policy: it picks one of the candidates, and no backend is left out for good."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.router.policies import POLICIES
from tests.router.policies.views import Counts, backends, policy, request

WEIGHTS = st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=6)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40)
@given(weights=WEIGHTS, seed=st.integers(0, 2**32), data=st.data())
def test_the_pick_is_one_of_the_candidates(name: str, weights: list[float], seed: int, data: st.DataObject) -> None:
    """Whatever comes, ends, is removed or comes back, in whatever order the candidates stand."""
    random = Random(seed)
    views = backends(*weights)
    counts = Counts(policy(name), views)
    for step in data.draw(st.lists(st.sampled_from(["send", "send", "end", "remove", "speed"]), max_size=40)):
        if step == "send":
            candidates = random.sample(views, random.randint(1, len(views)))
            document = random.randint(0, 1)
            blocks = [1000 * document + index for index in range(random.randint(0, 30))]
            chosen = counts.send(request(blocks, random.choice([None, "s", "t"])), candidates)
            assert chosen in candidates
        elif step == "end" and counts.running:
            counts.end(random.choice([None, 0.0, 0.5, 1.0]), random.randrange(len(counts.running)))
        elif step == "remove":
            counts.policy.removed(random.choice(views).key)
        elif step == "speed":
            random.choice(views).speed = random.choice([None, 0.0, 1.0, 100.0])


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25)
@given(weights=WEIGHTS, num_running=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_no_backend_is_left_out(name: str, weights: list[float], num_running: int, seed: int) -> None:
    """Many different requests, so many at once: everyone gets a fair part of them, for its weight."""
    random = Random(seed)
    counts = Counts(policy(name), backends(*weights))
    picks = Counter[str]()
    num_requests = 60 * len(weights)
    for number in range(num_requests):
        blocks = [number * 1000 + index for index in range(8)]
        picks[counts.send(request(blocks, f"session-{seed}-{number}")).key] += 1
        if len(counts.running) >= num_running:
            counts.end(0.0, random.randrange(len(counts.running)))
    for view in counts.views:
        share = 1 / len(weights) if name == "round-robin" else view.weight / sum(weights)
        # Few at once are spread by turns or by chance, many by weight: a quarter of the share is far from starving.
        assert picks[view.key] >= math.floor(num_requests * min(share, 1 / len(weights)) / 4), picks


@pytest.mark.parametrize("name", ["round-robin", "least-connections", "least-outstanding-tokens", "prefix-aware"])
def test_turns_are_fair_when_candidates_change(name: str) -> None:
    """A counter modulo the number of candidates would send everything to a here."""
    counts = Counts(policy(name), backends(1, 1))
    picks = Counter[str]()
    for number in range(100):
        chosen = counts.send(request(), counts.views[: 1 + number % 2])
        if number % 2:
            picks[chosen.key] += 1
        counts.end()
    assert picks["b"] >= 50, picks


@pytest.mark.parametrize("name", POLICIES)
def test_equal_backends_get_equal_parts(name: str) -> None:
    counts = Counts(policy(name), backends())
    picks = Counter(
        counts.send(request([number * 100 + index for index in range(8)], f"s{number}")).key for number in range(400)
    )
    low, high = (60, 140) if name in ("power-of-two", "session-affinity") else (100, 100)
    assert all(low <= picks[view.key] <= high for view in counts.views), picks
