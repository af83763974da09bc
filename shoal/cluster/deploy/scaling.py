"""How many replicas a model needs: pure arithmetic on what its replicas say, with time as an argument.

Up quickly: above a target for `up_after` seconds, to as many as the load asks for, at most twice as many. Down slowly:
one replica, when for `down_after` seconds the others could have carried all of it and would still have been well below
the targets. So what sends a replica away does not call it back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from shoal.config.deploy_file import ReplicaLimits, ScaleRules

# How full the remaining ones may become by a step down, of what would bring one back.
_SPARE = 0.75


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What one ready replica says: requests that wait and run, share of its KV cache in use."""

    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0


class History(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept from one decision to the next.

    wanted: what was decided last. above_since, below_since: since when the load calls for more, or would do with fewer.
    capacity: as many requests as a replica runs at a time, once one was seen to have others wait.
    """

    wanted: int
    above_since: float | None = None
    below_since: float | None = None
    capacity: int | None = None


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """wanted: replicas from now on; why: in words, for `shoal deploy status`."""

    wanted: int
    why: str
    history: History


def decide(
    now: float, observations: Sequence[Load], limits: ReplicaLimits, rules: ScaleRules, history: History
) -> Decision:
    """How many replicas there shall be. observations: of those that are ready, in any order."""
    before = min(max(history.wanted, limits.min), limits.max)
    if before != history.wanted:
        side = "min" if before > history.wanted else "max"
        return _change(before, f"{side} is {before}", _capacity(observations, history.capacity))
    capacity = _capacity(observations, history.capacity)
    if not observations:
        return _hold(history, "no replica is ready", None, None, capacity)
    need, reason = _need(observations, rules, before, capacity)
    if need > before:
        above = now if history.above_since is None else history.above_since
        if before >= limits.max:
            return _hold(history, f"{reason}; max is {limits.max}", above, None, capacity)
        if now - above < rules.up_after:
            return _hold(history, f"{reason} since {now - above:.1f} s", above, None, capacity)
        return _change(min(need, 2 * before, limits.max), reason, capacity)
    if before <= limits.min:
        return _hold(history, f"within its targets; min is {limits.min}", None, None, capacity)
    if len(observations) < before:
        return _hold(history, f"{len(observations)} of {before} replicas are ready", None, None, capacity)
    crowded = _crowded(observations, rules, before - 1, capacity)
    if crowded:
        return _hold(history, f"{before - 1} would not do: {crowded}", None, None, capacity)
    below = now if history.below_since is None else history.below_since
    if now - below < rules.down_after:
        return _hold(history, f"{before - 1} would do since {now - below:.1f} s", None, below, capacity)
    return _change(before - 1, f"{before - 1} would do for {rules.down_after:g} s", capacity)


def _need(observations: Sequence[Load], rules: ScaleRules, before: int, capacity: int | None) -> tuple[int, str]:
    """Replicas that the load asks for, and what of it does; no more than `before` when all is within the targets."""
    waiting, running, kv_usage = _sums(observations)
    need, reason = before, ""
    if waiting > rules.target_queue * before:
        # What waits needs places beside those that are taken.
        places = capacity or max(1, max(load.running for load in observations))
        need = before + max(1, math.ceil((waiting - rules.target_queue * before) / (places + rules.target_queue)))
        reason = f"{waiting} requests wait, {rules.target_queue:g} a replica may"
    for amount, target, text in (
        (kv_usage, rules.target_kv_usage, f"{kv_usage / len(observations):.0%} of the KV caches are in use"),
        (running, rules.target_running, f"{running} requests run"),
    ):
        if target is not None and amount > target * before and math.ceil(amount / target) > need:
            need, reason = math.ceil(amount / target), f"{text}; the target is {target:g} a replica"
    return need, reason


def _crowded(observations: Sequence[Load], rules: ScaleRules, remaining: int, capacity: int | None) -> str:
    """What would be too much for so many replicas; "" when they would carry it, and have room."""
    waiting, running, kv_usage = _sums(observations)
    if waiting > _SPARE * rules.target_queue * remaining:
        return f"{waiting} requests wait"
    if kv_usage > _SPARE * rules.target_kv_usage * remaining:
        return f"they use {kv_usage:.0%} of one KV cache"
    for places in (rules.target_running, capacity):
        if places is not None and running + waiting > _SPARE * places * remaining:
            return f"{running + waiting} requests are there, and a replica runs {places:g}"
    return ""


def _sums(observations: Sequence[Load]) -> tuple[int, int, float]:
    return (
        sum(load.waiting for load in observations),
        sum(load.running for load in observations),
        sum(load.kv_usage for load in observations),
    )


def _capacity(observations: Sequence[Load], known: int | None) -> int | None:
    """A replica that has requests wait runs as many as it can."""
    full = [load.running for load in observations if load.waiting > 0 and load.running > 0]
    return max(full) if full else known


def _hold(history: History, why: str, above: float | None, below: float | None, capacity: int | None) -> Decision:
    kept = History(wanted=history.wanted, above_since=above, below_since=below, capacity=capacity)
    return Decision(wanted=history.wanted, why=why, history=kept)


def _change(wanted: int, why: str, capacity: int | None) -> Decision:
    return Decision(wanted=wanted, why=why, history=History(wanted=wanted, capacity=capacity))
