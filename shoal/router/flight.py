"""Flight: one request on one backend, from its sending to its end. Keeps the backend's live counts right."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from shoal.router.breaker import BreakerState
from shoal.router.policies import Policy, RequestView

if TYPE_CHECKING:
    from shoal.router.backend import Backend

# Of a stream's measured speed this share is new.
_SPEED_SHARE = 0.2
_SPEED_MIN_TOKENS = 4
# Between the bytes of a read and the next read; longer, and the client is slow.
_SLOW_SECONDS = 1.0


class Flight:
    """Begun by the failover, ended by it exactly once, however the attempt ended.

    waiting_since: since when it waits for bytes of the backend; None while it does something else (the client is slow).
    Only while it waits may `interrupt` end it. last_progress: of the request, when tokens last came, here or elsewhere.
    last_sign: when bytes last came. by_frames: the server is to say regularly that it is there, and does once it
    has_beats. is_running: the request is in the server's engine, as far as that has said. may_move: whether another
    server could take it on now. deadline: seconds without progress; patience: until an answer by frames has to begin.
    """

    def __init__(self, backend: Backend, model: str, request: RequestView, policy: Policy) -> None:
        self.backend = backend
        self.model = model
        self.request = request
        self.started = self.last_progress = backend.clock()
        self.waiting_since: float | None = None
        self.last_sign = self.started
        self.by_frames = False
        self.has_beats = False
        self.is_running = False
        self.may_move: Callable[[], bool] = lambda: True
        self.deadline = math.inf
        self.patience = math.inf
        self.num_tokens = 0
        self.num_cached_tokens: int | None = None
        self.num_prompt_tokens: int | None = None
        self.reason: Exception | None = None
        self._task = asyncio.current_task()
        self._policy = policy
        self._first_token = 0.0
        self._prompt_share = request.num_prompt_tokens
        self._output_share = max(request.num_tokens - request.num_prompt_tokens, 0)
        view = backend.view
        view.num_running += 1
        view.outstanding_tokens += request.num_tokens
        backend.flights.add(self)
        backend.breaker.started(self.started)
        policy.started(backend.url, request)

    def begin_wait(self, now: float) -> None:
        """It waits for bytes of the backend. What a slow client took before that is no time without progress."""
        self.waiting_since = now
        if now - self.last_sign > _SLOW_SECONDS:
            self.last_progress = max(self.last_progress, now)

    def progress(self, num_tokens: int, now: float) -> None:
        """So many tokens have come."""
        self.last_progress = now
        view = self.backend.view
        if not self.num_tokens:
            self._first_token = now
            breaker = self.backend.breaker
            if breaker.state(now) is BreakerState.HALF_OPEN:
                breaker.succeeded(now)  # others need not wait for the end of a long answer
            view.outstanding_tokens -= self._prompt_share
            self._prompt_share = 0
        self.num_tokens += num_tokens
        done = min(num_tokens, self._output_share)
        self._output_share -= done
        view.outstanding_tokens -= done

    def interrupt(self, reason: Exception) -> bool:
        """End the wait for the backend, with this reason; False when it does not wait for it now."""
        if self.waiting_since is None or self.reason is not None or self._task is None:
            return False
        self.reason = reason
        self._task.cancel()
        return True

    def take_interrupt(self) -> Exception | None:
        """Why the wait was ended, when it was `interrupt` that did it and nobody else; the cancellation is undone."""
        reason, self.reason = self.reason, None
        if reason is not None and self._task is not None and self._task.uncancel() > 0:
            return None  # the client went away, too
        return reason

    def end(self) -> None:
        backend, now = self.backend, self.backend.clock()
        view = backend.view
        view.num_running -= 1
        view.outstanding_tokens -= self._prompt_share + self._output_share
        backend.flights.discard(self)
        self._prompt_share = self._output_share = 0
        if self.num_tokens >= _SPEED_MIN_TOKENS and self.last_progress > self._first_token:
            speed = (self.num_tokens - 1) / (self.last_progress - self._first_token)
            view.speed = speed if view.speed is None else view.speed + _SPEED_SHARE * (speed - view.speed)
        self._policy.finished(
            backend.url, self.request, self.num_cached_tokens, self.num_prompt_tokens, now - self.started
        )
