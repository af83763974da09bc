"""Forwarding: the life of one request, over as many attempts on as many backends as it takes. app.py makes one each.

An attempt that fails leaves its backend out of the next choice. While there is nobody to send to, the request waits, as
long as it may be without progress. A request that was there when two engines ended runs alone next; the third end is
its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from random import Random

import aiohttp

from shoal.errors import ShoalError, UnavailableError
from shoal.log import get_logger
from shoal.observability.router_metrics import RouterMetrics
from shoal.protocol.errors import error_headers
from shoal.router.asgi import Answer
from shoal.router.backend import Backend
from shoal.router.breaker import BreakerState
from shoal.router.flight import Flight
from shoal.router.foreign import ForeignAttempt
from shoal.router.native import Journal, NativeAttempt
from shoal.router.outcome import (
    AttemptError,
    Ended,
    Lost,
    Moved,
    QueryOfDeathError,
    Realign,
    Refused,
)
from shoal.router.policies import RequestView
from shoal.router.pool import Pool
from shoal.router.request import GenerationRequest
from shoal.router.text_journal import TextJournal
from shoal.router.upstream import describe, refuses_connections
from shoal.router.watch import leave_out

CRASHES_ALONE = 2
# So often may servers say that they failed on a request, each of them once at least, before its client is told so: it
# may be the request's fault.
_MAX_ERRORS = 3
_MOST_ERRORS = 12  # with servers left that are away: about ten seconds, in which one of them may come back
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0
_LONGEST_WAIT = 0.5
# Said by a server that the operator has to set right, not the client.
_OPERATORS_FAULT = (401, 403, 404)
_BUSY = (429, 503)

logger = get_logger(__name__)


@dataclasses.dataclass
class ForwardContext:
    """What all requests of a router share. internal_secret: what servers are shown at /internal/…."""

    pool: Pool
    session: aiohttp.ClientSession
    metrics: RouterMetrics
    stall_timeout: float
    random: Random
    internal_secret: str | None = None


@dataclasses.dataclass
class Begun:
    """Where a request begins that may have been answered in part before. by_frames: as its stream has begun."""

    journal: Journal
    text: TextJournal
    by_frames: bool | None = None


class Forwarding:
    """One request. `run` returns when the client was told everything, or cannot be told any more."""

    def __init__(
        self,
        context: ForwardContext,
        request: GenerationRequest,
        view: RequestView,
        answer: Answer,
        begun: Begun | None = None,
    ) -> None:
        """begun: of a request that has a past."""
        self.journal = Journal() if begun is None else begun.journal
        self.text = TextJournal(request) if begun is None else begun.text
        self.num_attempts = 0
        self._context = context
        self._request = request
        self._view = view
        self._answer = answer
        self._admitted = context.pool.clock()
        self._last_progress = request.arrived
        self._excluded: set[Backend] = set()
        self._last_refusal: Refused | None = None
        self._last_reason = ""
        self._errors: Counter[Backend] = Counter()
        self._charged: set[Backend] = set()  # to their breakers: no request opens one alone
        self._num_rounds = 0
        self._is_realigned = False
        # By frames or by text: decided with the first byte that the client gets.
        self._by_frames: bool | None = None if begun is None else begun.by_frames

    @property
    def num_tokens(self) -> int:
        """Generated so far, as far as is known."""
        text = self.text
        known = text.usage.completion_tokens if text.usage is not None else text.num_tokens
        return max(self.journal.num_tokens, known, text.num_tokens)

    @property
    def num_prompt_tokens(self) -> int | None:
        """As a server counted them; None while none has said."""
        usage = self.text.usage
        return self.journal.num_prompt_tokens or (usage.prompt_tokens if usage is not None else None)

    async def run(self) -> None:
        """Raises nothing but what cancels it: every end of a request is told to its client here."""
        try:
            while True:
                backend = await self._choose()
                if await self._attempt(backend):
                    return
        except Ended as end:
            await self._answer.failure(end.status, end.body)
        except Refused as refusal:
            headers = {**error_headers(refusal.status), **refusal.headers}
            await self._answer.failure(refusal.status, refusal.body, headers)
        except ShoalError as error:
            await self._answer.error(error)

    @property
    def _kind(self) -> bool | None:
        """What a stream that has begun by frames needs; by text all servers can go on."""
        return self._by_frames or None

    # --- choosing ----------------------------------------------------------------------------------------------------

    async def _choose(self) -> Backend:
        """The backend for the next attempt. Waits for one; raises when the request has waited for too long."""
        pool = self._context.pool
        while True:
            candidates = self._candidates()
            if candidates:
                return pool.pick(self._view, candidates)
            left = self._last_progress + self._request.deadline - pool.clock()
            if left <= 0:
                raise self._gave_up()
            if self._excluded and pool.candidates(self._request.model, native=self._kind):
                # All that are there have failed on it once: after a pause they are asked again.
                await self._pause(left)
                self._excluded.clear()
                continue
            self._excluded.clear()
            trial = pool.seconds_until_trial(self._request.model)
            await pool.wait_change(min(left, _LONGEST_WAIT if trial is None else max(trial, 0.001)))

    def _candidates(self) -> list[Backend]:
        pool, model = self._context.pool, self._request.model
        found = pool.candidates(model, self._excluded, self._kind)
        if self._by_frames is None and self.journal.answers:
            # What is in the journal need not be computed again, though it is no must.
            return [backend for backend in found if backend.native] or found
        return found

    async def _pause(self, left: float) -> None:
        pause = min(_FIRST_PAUSE * 2**self._num_rounds, _LONGEST_PAUSE)
        self._num_rounds += 1
        await asyncio.sleep(min(pause * (0.5 + self._context.random.random() / 2), left))

    def _gave_up(self) -> Exception:
        if self._last_refusal is not None and not self._answer.started:
            return self._last_refusal
        model, deadline, pool = self._request.model, self._request.deadline, self._context.pool
        why = f"; the last one: {self._last_reason}" if self._last_reason else f": {pool.why_out(pool.serving(model))}"
        return UnavailableError(f"no server of the model {model!r} could take the request for {deadline:g} s{why}")

    # --- one attempt -------------------------------------------------------------------------------------------------

    async def _attempt(self, backend: Backend) -> bool:
        """Whether the request has come to its end."""
        context, now = self._context, self._context.pool.clock()
        if self.num_attempts == 0:
            context.metrics.first_sent(now - self._admitted)
        elif (self.num_tokens or self._answer.started) and not self._is_realigned:
            context.metrics.moved(self.num_tokens)
        self._is_realigned = False
        self.num_attempts += 1
        flight = Flight(backend, self._request.model, self._view, context.pool.policy)
        flight.deadline = self._request.deadline
        flight.last_progress = self._last_progress
        flight.patience = context.stall_timeout + len(self._request.body) / 1_000_000
        breaker = backend.breaker
        was_on_trial = breaker.state(now) is not BreakerState.CLOSED
        by_frames = bool(backend.native) and self._by_frames is not False
        native = None
        try:
            try:
                if by_frames:
                    flight.by_frames = True
                    native = NativeAttempt(self._request, self.journal, flight, self._answer, context.stall_timeout)
                    alone = self.journal.num_crashes >= CRASHES_ALONE
                    await native.run(context.session, alone, context.internal_secret)
                else:
                    flight.may_move = lambda: not self._answer.started or self.text.why_not() is None
                    await ForeignAttempt(self._request, self.text, flight, self._answer).run(context.session)
            except asyncio.CancelledError:
                reason = flight.take_interrupt()
                if reason is None:
                    raise
                raise reason from None
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                raise Lost(f"the connection broke ({describe(error)})", broke=True) from error
        except AttemptError as failure:
            flight.waiting_since = None  # what befalls the others there is nothing to this one any more
            if isinstance(failure, Lost) and failure.broke and flight.is_running:
                failure.crashed = await refuses_connections(backend.url)
            self._after(backend, failure, flight.started)
            return False
        except BaseException as end:
            # By text, an error of the request says too little of the server.
            well = by_frames and isinstance(end, Ended) and end.status < 500
            (breaker.succeeded if well else breaker.undecided)(context.pool.clock())
            raise
        else:
            breaker.succeeded(context.pool.clock())
            return True
        finally:
            if flight.num_tokens:
                self._last_progress = max(self._last_progress, flight.last_progress)
            if self._answer.started and self._by_frames is None:
                self._by_frames = by_frames
            flight.end()
            if was_on_trial:
                context.pool.changed()

    def _after(self, backend: Backend, failure: AttemptError, began: float) -> None:
        """An attempt has failed: what that says of the backend, and whether the request may go on."""
        now = self._context.pool.clock()
        if isinstance(failure, Realign):
            backend.breaker.succeeded(now)
            self._is_realigned = True
            return
        self._excluded.add(backend)
        self._last_reason = f"{backend.url}: {failure}"
        match failure:
            case Refused():
                self._after_refusal(backend, failure, now)
            case Moved():
                backend.breaker.undecided(now)
                backend.health.admitting = False
                backend.health.why = "is shutting down"
                backend.suspect()
            case Lost():
                logger.warning("request %s: %s: %s", self._request.request_id, backend.url, failure)
                if failure.slow and backend.last_sign > began:
                    backend.breaker.undecided(now)  # it answers others
                else:
                    self._charge(backend, now, began)
                if failure.stalled or failure.engine_lost:
                    leave_out(backend, str(failure), interrupt=failure.stalled, crashed=failure.crashed)
                backend.suspect()
                if failure.crashed:
                    self.journal.num_crashes += 1
                    if self.journal.num_crashes > CRASHES_ALONE:
                        raise QueryOfDeathError(
                            f"{self.journal.num_crashes} engines ended while they worked on the request "
                            f"{self._request.request_id}; it is not tried again"
                        )
        self._context.metrics.retried(_kind(failure))

    def _charge(self, backend: Backend, now: float, began: float | None = None) -> None:
        """A failure of the backend; the first one of this request there counts, for it may be the request's fault."""
        if backend in self._charged:
            backend.breaker.undecided(now)
        else:
            self._charged.add(backend)
            backend.breaker.failed(now, began)

    def _after_refusal(self, backend: Backend, refusal: Refused, now: float) -> None:
        status = refusal.status
        if refusal.in_stream:
            self._after_error(backend, refusal, now)
        elif status in _BUSY:
            backend.breaker.undecided(now)
            self._last_refusal = refusal
            if status == 503:
                backend.suspect()
        elif status in _OPERATORS_FAULT:
            if status == 404 and b"model_not_found" not in refusal.body:
                backend.leave("does not know the path of requests any more")  # what it speaks is asked anew
            logger.error(
                "%s answers %d to the request %s: %s", backend.url, status, self._request.request_id, refusal.body[:300]
            )
            backend.breaker.undecided(now)
            backend.suspect()
            self._last_refusal = refusal
            if not self._candidates():
                raise refusal
        elif status < 500:
            backend.breaker.succeeded(now)
            # What another server has taken in, this one may still refuse: the prompt is too long for it, say.
            if not (self._answer.started or self.journal.answers) or not self._candidates():
                raise refusal
        else:
            self._after_error(backend, refusal, now)

    def _after_error(self, backend: Backend, refusal: Refused, now: float) -> None:
        """It says that it failed on the request."""
        logger.warning("request %s: %s answers %d", self._request.request_id, backend.url, refusal.status)
        self._charge(backend, now)
        self._last_refusal = refusal
        self._errors[backend] += 1
        others = [each for each in self._context.pool.serving(self._request.model) if not self._errors[each]]
        if self._errors.total() >= (_MOST_ERRORS if others else _MAX_ERRORS):
            raise refusal


def _kind(failure: AttemptError) -> str:
    match failure:
        case Refused():
            return f"status_{failure.status}"
        case Moved():
            return "moved"
        case Lost():
            return "stalled" if failure.stalled else "lost"
    return "other"
