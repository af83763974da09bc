"""BubbleMeter: the share of time in which each pipeline stage computed nothing although steps were in flight."""

from __future__ import annotations

import time
from collections.abc import Callable

_WINDOW_SECONDS = 5.0


class BubbleMeter:
    """The core tells it when steps begin and end to be in flight; `shares` is of the newest five seconds of steps."""

    def __init__(
        self, stage_busy_seconds: Callable[[], list[float]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """stage_busy_seconds: see Executor."""
        self.shares: list[float] = []  # none with one stage, or before the first five seconds
        self._stage_busy_seconds = stage_busy_seconds
        self._clock = clock
        self._step_seconds = 0.0  # since the window began, up to `since` where steps are in flight
        self._since: float | None = None
        self._busy_before: list[float] = stage_busy_seconds()

    def begin(self) -> None:
        """A step is in flight where there was none."""
        self._since = self._clock()

    def end(self) -> None:
        """The last step in flight has ended."""
        self._fold()
        self._since = None

    def update(self) -> None:
        """Make new `shares` when it is time to; called now and then."""
        self._fold()
        if not self._busy_before or self._step_seconds < _WINDOW_SECONDS:
            return
        busy = self._stage_busy_seconds()
        self.shares = [
            min(1.0, max(0.0, 1 - (after - before) / self._step_seconds))
            for before, after in zip(self._busy_before, busy, strict=True)
        ]
        self._busy_before, self._step_seconds = busy, 0.0

    def _fold(self) -> None:
        if self._since is not None:
            now = self._clock()
            self._step_seconds += now - self._since
            self._since = now
