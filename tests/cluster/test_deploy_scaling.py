"""How many replicas: bounds, hysteresis and what must never happen, for any load."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.deploy.scaling import Decision, History, Load, decide
from shoal.config.deploy_file import ReplicaLimits, ScaleRules

RULES = ScaleRules(target_queue=2, target_kv_usage=0.8, up_after=3, down_after=60)
LIMITS = ReplicaLimits(min=1, max=8)
CALM = Load(running=1, kv_usage=0.05)

loads = st.lists(
    st.builds(
        Load,
        waiting=st.integers(0, 60),
        running=st.integers(0, 64),
        kv_usage=st.floats(0, 1),
    ),
    max_size=9,
)
rules = st.builds(
    ScaleRules,
    target_queue=st.floats(0, 20),
    target_kv_usage=st.floats(0.05, 1),
    target_running=st.none() | st.floats(0.5, 64),
    up_after=st.floats(0, 10),
    down_after=st.floats(0, 100),
)
limits = st.tuples(st.integers(1, 8), st.integers(0, 8)).map(
    lambda pair: ReplicaLimits(min=pair[0], max=pair[0] + pair[1])
)


def run(history: History, observations: list[Load], seconds: float, step: float = 1.0, now: float = 0.0) -> Decision:
    """The same load for so long; the first change, or the last decision."""
    decision = None
    for number in range(int(seconds / step) + 1):
        decision = decide(now + number * step, observations, LIMITS, RULES, history)
        if decision.wanted != history.wanted:
            return decision
        history = decision.history
    assert decision is not None
    return decision


def test_a_queue_brings_replicas_soon():
    busy = [Load(waiting=10, running=4)]
    assert run(History(wanted=1), busy, 2.9).wanted == 1
    decision = run(History(wanted=1), busy, 3)
    assert decision.wanted == 2, "at most twice as many at a time"
    assert decision.why == "10 requests wait, 2 a replica may"
    assert decision.history.capacity == 4


def test_a_short_peak_brings_none():
    history = History(wanted=1)
    for second in range(30):
        history = decide(second, [Load(waiting=9, running=4) if second % 3 else CALM], LIMITS, RULES, history).history
    assert history.wanted == 1


def test_full_caches_bring_replicas():
    decision = run(History(wanted=2), [Load(running=3, kv_usage=0.95)] * 2, 3)
    assert decision.wanted == 3 and "95% of the KV caches" in decision.why


def test_calm_takes_one_at_a_time_and_late():
    history = History(wanted=3)
    assert run(history, [CALM] * 3, 59).wanted == 3
    decision = run(history, [CALM] * 3, 60)
    assert decision.wanted == 2 and decision.history.below_since is None
    assert run(decision.history, [CALM] * 2, 59, now=60).wanted == 2
    assert run(decision.history, [CALM] * 2, 60, now=60).wanted == 1


def test_none_goes_while_its_requests_would_not_fit_elsewhere():
    full = [Load(running=4)] * 2
    kept = run(History(wanted=2, capacity=4), full, 600)
    assert kept.wanted == 2 and kept.why == "1 would not do: 8 requests are there, and a replica runs 4"
    assert run(History(wanted=2, capacity=4), [Load(running=1)] * 2, 600).wanted == 1


def test_none_goes_while_some_are_missing():
    kept = run(History(wanted=3), [CALM] * 2, 600)
    assert kept.wanted == 3 and kept.why == "2 of 3 replicas are ready"
    assert run(History(wanted=3), [], 600).why == "no replica is ready"


def test_new_limits_count_at_once():
    assert decide(0, [CALM], ReplicaLimits(min=2, max=4), RULES, History(wanted=1)).wanted == 2
    assert decide(0, [CALM] * 4, ReplicaLimits(min=1, max=2), RULES, History(wanted=4)).why == "max is 2"


def test_at_its_bounds_it_says_so():
    assert run(History(wanted=8), [Load(waiting=50, running=9)] * 8, 10).why.endswith("max is 8")
    assert run(History(wanted=1), [CALM], 10).why == "within its targets; min is 1"


@given(st.lists(st.tuples(st.floats(0, 100), loads), max_size=30), limits, rules, st.integers(0, 12))
def test_bounds_and_pace_hold_whatever_comes(steps, limits, rules, wanted):
    history, now = History(wanted=wanted), 0.0
    last_change = 0.0
    for number, (seconds, observations) in enumerate(steps):
        now += seconds
        decision = decide(now, observations, limits, rules, history)
        assert limits.min <= decision.wanted <= limits.max
        assert decision.wanted == decision.history.wanted and decision.why
        if limits.min <= history.wanted <= limits.max:
            change = decision.wanted - history.wanted
            assert change >= -1 and decision.wanted <= max(1, 2 * history.wanted)
            if change < 0:
                assert now - last_change >= rules.down_after and len(observations) >= history.wanted
            if change > 0:
                assert now - last_change >= rules.up_after
            if change:
                last_change = now
        elif number == 0:
            last_change = now
        history = decision.history


@given(loads.filter(bool), rules, st.none() | st.integers(1, 64))
def test_what_sends_a_replica_away_does_not_call_it_back(observations, rules, capacity):
    """All that was there is spread over the others: they do not ask for another one."""
    wanted = len(observations)
    limits = ReplicaLimits(min=1, max=9)
    first = decide(0, observations, limits, rules, History(wanted=wanted, capacity=capacity))
    later = decide(rules.down_after + 1, observations, limits, rules, first.history)
    if later.wanted != wanted - 1 or first.wanted != wanted:
        return
    waiting, running = (sum(getattr(load, name) for load in observations) for name in ("waiting", "running"))
    kv_usage = sum(load.kv_usage for load in observations)
    share = [
        Load(
            waiting=waiting // later.wanted + (index < waiting % later.wanted),
            running=running // later.wanted + (index < running % later.wanted),
            kv_usage=kv_usage / later.wanted,
        )
        for index in range(later.wanted)
    ]
    history = later.history
    for second in range(3):
        decision = decide(1000 + 100 * second, share, limits, rules, history)
        assert decision.wanted <= later.wanted
        history = decision.history


@given(loads.filter(bool), rules, st.integers(1, 9), st.integers(0, 8), st.integers(1, 20))
def test_more_that_waits_never_wants_fewer(observations, rules, wanted, index, more):
    limits = ReplicaLimits(min=1, max=9)
    index %= len(observations)
    busier = list(observations)
    busier[index] = Load(
        waiting=busier[index].waiting + more, running=busier[index].running, kv_usage=busier[index].kv_usage
    )
    history = History(wanted=wanted, above_since=-1000.0, capacity=8)
    calm, busy = (decide(0, each, limits, rules, history).wanted for each in (observations, busier))
    assert busy >= calm


@pytest.mark.parametrize("capacity", [4, 8])
@given(demand=st.integers(0, 40))
def test_a_steady_demand_settles(capacity, demand):
    """A closed loop: `demand` clients, replicas that run `capacity` each. After a while nothing changes any more."""
    limits = ReplicaLimits(min=1, max=8)
    rules = ScaleRules(target_queue=1, up_after=1, down_after=5)
    history, changes = History(wanted=1), []
    for now in range(300):
        share = [demand // history.wanted + (index < demand % history.wanted) for index in range(history.wanted)]
        observations = [Load(running=min(each, capacity), waiting=max(0, each - capacity)) for each in share]
        decision = decide(now, observations, limits, rules, history)
        if decision.wanted != history.wanted:
            changes.append(now)
        history = decision.history
    assert not changes or changes[-1] < 150
    assert history.wanted * (capacity + rules.target_queue) >= demand or history.wanted == limits.max
