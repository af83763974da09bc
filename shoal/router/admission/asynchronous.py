"""The admission queue with awaiting: one AsyncAdmission a router process, on its event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator

from shoal.errors import UnavailableError
from shoal.router.admission.entry import Entry, EntryState
from shoal.router.admission.queue import AdmissionQueue


class AsyncAdmission:
    """Holds the futures of those who wait, and a timer while one of them can wait too long; no task of its own.

    clock: seconds that rise steadily, as those of the event loop.
    """

    def __init__(self, queue: AdmissionQueue, clock: Callable[[], float] = time.monotonic) -> None:
        self.queue = queue
        self._clock = clock
        self._wakers: dict[Entry, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_deadline = 0.0

    @contextlib.asynccontextmanager
    async def admit(self, entry: Entry) -> AsyncIterator[Entry]:
        """Waits until the request may be forwarded, and holds its place for the time of the `async with`.

        Raises UnavailableError with `retry_after` when there is no room in the queue, when it waited for longer than
        `max_wait`, and when the queue is closed. A task that is cancelled while it waits leaves nothing behind.
        """
        self._settle(self.queue.offer(entry, self._clock()))
        try:
            if entry.state is EntryState.QUEUED:
                await self._wait(entry)
            if entry.state is not EntryState.ADMITTED:
                raise self._error(entry)
            yield entry
        finally:
            # Whatever came first, the admission, an end or a cancellation: the queue knows where the entry is.
            self._wakers.pop(entry, None)
            self._settle(self.queue.cancel(entry, self._clock()))

    @contextlib.contextmanager
    def room(self, num_bytes: int) -> Iterator[None]:
        """A place of the queue for one that waits for something else, before it is `admit`ted.

        Raises UnavailableError with `retry_after` when there is none.
        """
        if not self.queue.reserve(num_bytes):
            retry_after = self.queue.retry_after(self._clock())
            raise UnavailableError(f"{self._why_no_room()}; {_again(retry_after)}", retry_after=retry_after)
        try:
            yield
        finally:
            self.queue.unreserve(num_bytes)

    def set_capacity(self, capacity: int) -> None:
        """From now on that many at once; those who may go now are woken."""
        self._settle(self.queue.set_capacity(capacity, self._clock()))

    def close(self) -> None:
        """The router ends: those who wait get UnavailableError, and all who come. Those who are admitted go on."""
        self._settle(self.queue.close(self._clock()))

    async def _wait(self, entry: Entry) -> None:
        waker = self._wakers[entry] = asyncio.get_running_loop().create_future()
        self._set_timer()
        await waker

    def _settle(self, changed: list[Entry]) -> None:
        """Wake those whose wait has ended."""
        for entry in changed:
            waker = self._wakers.pop(entry, None)
            # One that was cancelled in this turn of the loop has its `finally` still to run.
            if waker is not None and not waker.done():
                waker.set_result(None)
        self._set_timer()

    def _set_timer(self) -> None:
        deadline = self.queue.next_deadline()
        if deadline == self._timer_deadline and self._timer is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            delay = max(deadline - self._clock(), 0.0)
            self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)
            self._timer_deadline = deadline

    def _on_timer(self) -> None:
        self._timer = None
        self._settle(self.queue.expire(self._clock()))

    def _error(self, entry: Entry) -> UnavailableError:
        if entry.state is EntryState.EXPIRED and not self.queue.closed:
            what = f"the request waited {entry.max_wait:.3g} seconds and no server had room for it"
        else:
            what = self._why_no_room()
        return UnavailableError(f"{what}; {_again(entry.retry_after)}", retry_after=entry.retry_after)

    def _why_no_room(self) -> str:
        if self.queue.closed:
            return "the router is shutting down and takes no new requests"
        return f"too many requests wait already ({self.queue.num_waiting}, {self.queue.waiting_bytes} bytes)"


def _again(retry_after: float) -> str:
    return f"try again in {retry_after:.0f} seconds"
