"""What to do next with the replicas of one model: pure; the controller does it.

Surge: of a changed plan one replica more than wanted comes up, and only when it is ready and in the router an old one
goes. One that does not come up takes the plan back; those of the old plan stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

# A program that ends so often before it was ready does not come up.
MAX_EARLY_ENDS = 2


class View(msgspec.Struct, frozen=True, kw_only=True):
    """A replica as the controller sees it. phase: as in ReplicaRecord. age: seconds since it was asked for.

    serving: ready, and let in by the router. was_serving: it was so once.
    """

    name: str
    revision: str
    phase: str
    serving: bool
    was_serving: bool
    age: float
    num_early_ends: int = 0
    running: int = 0
    why: str = ""


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """num_start: new replicas of the target. drain: names that get no new requests, and go when they have none.

    failed: replicas of the target that do not come up, and failure: why. stands: the target has taken over, with as
    many as there must be. settled: all is as it shall be.
    """

    num_start: int = 0
    drain: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    failure: str = ""
    stands: bool = False
    settled: bool = False


def plan_steps(
    replicas: Sequence[View], target: str | None, wanted: int, *, minimum: int, start_timeout: float
) -> Steps:
    """target: the revision that all shall have; None: all go. wanted: how many; minimum: how many there must be."""
    up = [view for view in replicas if view.phase == "up"]
    leaving = len(replicas) - len(up)
    if target is None:
        return Steps(drain=tuple(view.name for view in up), settled=not replicas)
    ours = [view for view in up if view.revision == target]
    old = [view for view in up if view.revision != target]
    failures = {view.name: reason for view in ours if (reason := _failure(view, start_timeout))}
    if failures:
        return Steps(failed=tuple(failures), failure=next(iter(failures.values())))
    if old:
        return _replace(ours, old, leaving, wanted)
    stands = sum(view.serving for view in ours) >= min(minimum, wanted)
    if len(ours) < wanted:
        return Steps(num_start=wanted - len(ours), stands=stands)
    surplus = sorted(ours, key=_dispensable)[: len(ours) - wanted]
    settled = not surplus and not leaving and all(view.serving for view in ours)
    return Steps(drain=tuple(view.name for view in surplus), stands=stands, settled=settled)


def _replace(ours: Sequence[View], old: Sequence[View], leaving: int, wanted: int) -> Steps:
    """One at a time: never more than one above what is wanted, never fewer that serve than before."""
    if any(not view.serving for view in ours):
        # An old one that serves nobody is no loss, and its place may be the one that is missing.
        return Steps(drain=tuple(view.name for view in old if not view.was_serving))
    if len(ours) + len(old) > wanted:
        return Steps(drain=(min(old, key=_dispensable).name,))
    if leaving:
        return Steps()
    return Steps(num_start=1)


def _dispensable(view: View) -> tuple[bool, int, float]:
    """The first to go: what serves nobody, then what has the least to do, then the youngest."""
    return view.serving, view.running, view.age


def _failure(view: View, start_timeout: float) -> str:
    if view.was_serving:
        return ""
    if view.num_early_ends >= MAX_EARLY_ENDS:
        return f"{view.name} ended before it was ready: {view.why}"
    if view.age > start_timeout:
        return f"{view.name} was not ready after {start_timeout:g} s: {view.why or 'it does not say why'}"
    return ""
