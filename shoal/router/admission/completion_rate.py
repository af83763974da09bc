"""How fast requests have been completing lately, for Retry-After. Used by the queue."""

from __future__ import annotations

import math

# What completed this many seconds ago counts 1/e as much as what completes now.
_MEMORY_SECONDS = 20.0
# Seconds to tell a client while nothing is known, and the bounds of what it is told.
_UNKNOWN = 5.0
_SHORTEST = 1.0
_LONGEST = 60.0


class CompletionRate:
    """Completions per second, with exponentially fading memory."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._first: float | None = None
        self._then = 0.0

    def add(self, now: float) -> None:
        """A request has completed."""
        if self._first is None:
            self._first = self._then = now
        self._fade(now)
        self._sum += 1

    def per_second(self, now: float) -> float:
        """0 while nothing has completed."""
        if self._first is None:
            return 0.0
        self._fade(now)
        # The sum has seen this much of its memory so far; at least a second, so that the first one is no burst.
        seen = max(now - self._first, 1.0)
        return self._sum / (_MEMORY_SECONDS * -math.expm1(-seen / _MEMORY_SECONDS))

    def seconds_for(self, num_requests: int, now: float) -> float:
        """How long that many completions will take, within bounds that make sense to a client."""
        if self._first is None:
            return _UNKNOWN
        rate = self.per_second(now)
        return min(max(num_requests / rate, _SHORTEST), _LONGEST) if rate * _LONGEST > num_requests else _LONGEST

    def _fade(self, now: float) -> None:
        self._sum *= math.exp(-max(now - self._then, 0.0) / _MEMORY_SECONDS)
        self._then = max(now, self._then)
