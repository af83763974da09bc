"""StallWatch: whether the ranks of an engine get on while a step is awaited. Used by the core; pure, no clock.

A rank gets on when its status record changes: another step, phase, layer or collective. On a GPU a step's layers are
queued at once and nothing changes while the device computes them, so that the limit must have room for a step.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.distributed.status import RankStatus

# Of the time of a full step, measured at the start: others share the device, and contexts grow.
_FULL_STEPS = 3.0


def step_allowance(full_step_seconds: float) -> float:
    """Seconds that ranks may show nothing because a step takes so long; 0 where they show layers."""
    return _FULL_STEPS * full_step_seconds


def stall_limit(stall_timeout: float, full_step_seconds: float) -> float:
    """Seconds without a sign after which ranks do not get on; 0: never. full_step_seconds: 0 where they show layers."""
    return stall_timeout + step_allowance(full_step_seconds) if stall_timeout else 0.0


class StallWatch:
    """limit: see `stall_limit`. `begin` when a step is awaited, `look` now and then meanwhile."""

    def __init__(self, limit: float, most_at_once: float, steps_take: float = 0.0) -> None:
        """most_at_once: seconds that one `look` may add: a process that was stopped itself has seen nothing of what
        happened meanwhile. steps_take: see `step_allowance`."""
        self.limit = limit
        self._steps_take = steps_take
        self._most_at_once = most_at_once
        self._marks: list[tuple[object, ...]] = []
        self._seconds = 0.0

    def begin(self) -> None:
        self._marks = []
        self._seconds = 0.0

    @property
    def seconds_beyond_steps(self) -> float:
        """Since a rank showed a sign, as far as anybody looked, less what steps may take."""
        return max(self._seconds - self._steps_take, 0.0)

    def look(self, statuses: Sequence[RankStatus], elapsed: float) -> bool:
        """Whether the ranks have stood still for the limit. elapsed: seconds since the last look, or since `begin`."""
        marks: list[tuple[object, ...]] = [
            (each.rank, each.step, each.phase, each.layer, each.since, each.num_collectives) for each in statuses
        ]
        if marks != self._marks:
            self._marks, self._seconds = marks, 0.0
            return False
        self._seconds += min(elapsed, self._most_at_once)
        return bool(self.limit) and self._seconds >= self.limit
