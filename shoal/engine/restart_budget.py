"""RestartBudget: how often a lost engine core may be started again, and how long to wait before. Used by recovery.py.

Pure: no clock, no process.
"""

from __future__ import annotations

import dataclasses
from collections import deque

_LONGEST_DELAY_SECONDS = 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class RestartLimits:
    """At most max_restarts within `window` seconds in which a core ran; 0: never."""

    max_restarts: int = 5
    window: float = 600.0


class RestartBudget:
    """The window is measured in seconds that cores ran: starts that take long and fail do not hide a loop, and a core
    that ran for the whole window leaves nothing to count."""

    def __init__(self, limits: RestartLimits) -> None:
        self.limits = limits
        self._seconds_run = 0.0
        self._attempts: deque[float] = deque()  # at which _seconds_run each was made

    @property
    def attempt(self) -> int:
        """The number of the attempt that was granted last."""
        return len(self._attempts)

    def take(self, seconds_run: float) -> float | None:
        """A core is lost after so many seconds; 0 for one that could not start. Returns the seconds to wait before the
        next attempt (0, 1, 2, 4 …), or None when there is none left."""
        self._seconds_run += seconds_run
        while self._attempts and self._seconds_run - self._attempts[0] >= self.limits.window:
            self._attempts.popleft()
        num_before = len(self._attempts)
        if num_before >= self.limits.max_restarts:
            return None
        self._attempts.append(self._seconds_run)
        return min(2.0 ** min(num_before - 1, 10), _LONGEST_DELAY_SECONDS) if num_before else 0.0
