"""Taking turns, and weights: what several policies are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shoal.router.policies.base import BackendView

# A backend that was measured slow still gets this part of what the mean one gets, so that it is measured again.
_SLOWEST = 0.05


class Turns:
    """Whose turn is it: shares in proportion to weights among those that may be chosen.

    Each has a time at which it may go next, and it moves on by 1 / weight when it is chosen; the earliest goes. Unlike
    with a counter, nobody starves when candidates differ from call to call, and who comes back has nothing to catch up.
    """

    def __init__(self) -> None:
        self._next: dict[str, float] = {}
        self._last: dict[str, int] = {}
        self._now = 0.0  # the time of the last one that went
        self._number = 0

    def take(self, candidates: Sequence[BackendView], indices: Iterable[int], weights: Sequence[float]) -> int:
        """The index, of `indices`, whose turn it is; it is chosen with that. On a tie the longest unchosen one."""

        def turn(index: int) -> tuple[float, int]:
            key = candidates[index].key
            return max(self._next.get(key, 0.0), self._now), self._last.get(key, 0)

        chosen = min(indices, key=turn)
        key = candidates[chosen].key
        self._number += 1
        self._now = turn(chosen)[0]
        self._next[key] = self._now + 1 / weights[chosen]
        self._last[key] = self._number
        return chosen

    def forget(self, key: str) -> None:
        self._next.pop(key, None)
        self._last.pop(key, None)


def effective_weights(candidates: Sequence[BackendView], by_speed: bool) -> list[float]:
    """The weight of each, times its measured speed if asked for. Backends without a measurement count as mean ones."""
    if not by_speed:
        return [backend.weight for backend in candidates]
    speeds = [backend.speed for backend in candidates if backend.speed is not None and backend.speed > 0]
    if not speeds:
        return [backend.weight for backend in candidates]
    mean = sum(speeds) / len(speeds)
    return [
        backend.weight * (1.0 if backend.speed is None else max(backend.speed / mean, _SLOWEST))
        for backend in candidates
    ]


def least(costs: Sequence[float]) -> list[int]:
    """The indices of the lowest costs."""
    lowest = min(costs)
    return [index for index, cost in enumerate(costs) if cost == lowest]
