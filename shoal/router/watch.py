"""Looks at all requests that wait for their servers, a few times a second, and ends waits that last too long.

One task for all of them: a timer for each read would cost more than the read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shoal.log import get_logger
from shoal.router.backend import Backend
from shoal.router.flight import Flight
from shoal.router.outcome import DeadlineError, Lost
from shoal.router.pool import Pool

_LONGEST_INTERVAL = 0.25
# A server is silent when this share of the timeout has passed since the last byte of any of its answers.
_SILENT_SHARE = 0.8
# Looks that come later than this share of the timeout tell of the router's own troubles.
_HELD_UP_SHARE = 0.5

logger = get_logger(__name__)


async def watch_forever(pool: Pool, stall_timeout: Callable[[], float]) -> None:
    """Until it is cancelled. stall_timeout: as it is set at the time."""
    last = pool.clock()
    while True:
        interval = min(_LONGEST_INTERVAL, stall_timeout() / 4)
        await asyncio.sleep(interval)
        now = pool.clock()
        if now - last > interval + _HELD_UP_SHARE * stall_timeout():
            _forgive(pool, now)
        else:
            look(pool, stall_timeout())
        last = now


def look(pool: Pool, stall_timeout: float) -> None:
    """Once: end what has waited for too long."""
    now = pool.clock()
    for backend in pool.with_flights():
        for flight in tuple(backend.flights):
            if flight.waiting_since is not None:
                _look_at(pool, backend, flight, now, stall_timeout)


def _forgive(pool: Pool, now: float) -> None:
    """This process itself was held up (stopped, starved): that nothing was read meanwhile says nothing of servers."""
    for backend in pool.with_flights():
        for flight in backend.flights:
            flight.last_sign = flight.last_progress = now


def leave_out(backend: Backend, why: str, *, interrupt: bool, crashed: bool = False) -> None:
    """No more requests for this backend until it has answered again; interrupt: its requests go elsewhere now. crashed:
    what its engine worked on may be the reason."""
    backend.leave(why)
    if interrupt:
        for flight in tuple(backend.flights):
            flight.interrupt(Lost(why, crashed=crashed and flight.is_running, stalled=True))
    backend.suspect()


def _look_at(pool: Pool, backend: Backend, flight: Flight, now: float, stall_timeout: float) -> None:
    assert flight.waiting_since is not None
    silent = now - max(flight.last_sign, flight.waiting_since)
    if flight.by_frames and silent > (stall_timeout if flight.has_beats else flight.patience):
        _silent(backend, flight, now, silent, stall_timeout)
    elif not backend.health.alive and silent > stall_timeout and now - backend.dead_since > stall_timeout:
        flight.interrupt(Lost(f"it does not answer any more ({backend.health.why})"))
    elif now - flight.last_progress > flight.deadline:
        flight.interrupt(
            DeadlineError(f"the request made no progress for {flight.deadline:g} s, which is as long as it may")
        )
    elif not flight.has_beats:
        without = now - max(flight.last_progress, flight.started)
        if without > flight.deadline / 2 and pool.candidates(flight.model, (backend,)) and flight.may_move():
            what = "given no token" if flight.num_tokens else "not begun its answer"
            flight.interrupt(Lost(f"it has {what} for {without:.1f} s", slow=True))


def _silent(backend: Backend, flight: Flight, now: float, silent: float, stall_timeout: float) -> None:
    """Nothing has come for one request. When nothing has come for others either, it is not the connection."""
    others_live = any(
        other is not flight and now - other.last_sign < _SILENT_SHARE * stall_timeout and other.has_beats
        for other in backend.flights
    )
    why = f"it has given no sign for {silent:.1f} s"
    if others_live:
        flight.interrupt(Lost(f"{why} on this connection"))
        return
    logger.warning("%s: %s; its %d requests move", backend.url, why, len(backend.flights))
    leave_out(backend, why, interrupt=True)
