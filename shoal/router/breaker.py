"""The circuit breaker of one backend. Pure: time is an argument. The pool asks it, attempts tell it how they ended.

closed: everything may go there. open: nothing may, until a back-off is over. half-open: one request, or one probe, may;
its end decides.
"""

from __future__ import annotations

import enum
import math
from random import Random

# Fewer failures than a request has attempts: it opens before they are used up.
FAILURES = 3
FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0
# Of the wait this share at most is random: routers and requests must not come back all at once.
_JITTER = 0.5


class BreakerState(enum.StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class CircuitBreaker:
    """Opens after `failures` failures without a success in between; each wait is twice as long as the one before."""

    def __init__(self, random: Random, failures: int = FAILURES) -> None:
        self.num_opened = 0
        self._random = random
        self._failures = failures
        self._num_failed = 0
        self._num_waits = 0
        self._state = BreakerState.CLOSED
        self._until = 0.0
        self._last_failure = -math.inf
        self._trial = False

    def state(self, now: float) -> BreakerState:
        if self._state is BreakerState.OPEN and now >= self._until:
            self._state = BreakerState.HALF_OPEN
            self._trial = False
        return self._state

    def allows(self, now: float) -> bool:
        """Whether a request may go there now."""
        state = self.state(now)
        return state is BreakerState.CLOSED or (state is BreakerState.HALF_OPEN and not self._trial)

    def seconds_until_trial(self, now: float) -> float:
        """0 while requests may go there, or one is being tried."""
        return max(self._until - now, 0.0) if self.state(now) is BreakerState.OPEN else 0.0

    def started(self, now: float) -> None:
        """A request is sent there. While half-open it is the only one."""
        if self.state(now) is BreakerState.HALF_OPEN:
            self._trial = True

    def succeeded(self, now: float) -> None:
        """It did what it should. What was sent before the breaker opened, and ends well now, closes it too."""
        self._state = BreakerState.CLOSED
        self._num_failed = self._num_waits = 0
        self._trial = False

    def failed(self, now: float, began: float | None = None) -> None:
        """It did not. While open nothing changes: those are the failures of requests that were there already.

        began: when the request was sent there. What was there already at the failure counted last says nothing more:
        one crash ends all that it meets.
        """
        state = self.state(now)
        if began is not None and state is BreakerState.CLOSED and began <= self._last_failure:
            return
        self._last_failure = now
        self._num_failed += 1
        if state is BreakerState.HALF_OPEN or (state is BreakerState.CLOSED and self._num_failed >= self._failures):
            self._open(now)

    def undecided(self, now: float) -> None:
        """The request ended without saying anything of the backend: its client went away, say."""
        if self.state(now) is BreakerState.HALF_OPEN:
            self._trial = False

    def _open(self, now: float) -> None:
        wait = min(FIRST_WAIT * 2**self._num_waits, LONGEST_WAIT)
        self._num_waits = min(self._num_waits + 1, 16)
        self._until = now + wait * (1 - _JITTER * self._random.random())
        self._state = BreakerState.OPEN
        self._trial = False
        self._num_failed = 0
        self.num_opened += 1
