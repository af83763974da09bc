"""The queue in front of the backends: so many requests at once, the others wait, by priority and fairly between keys.

Pure: every call takes the time. AsyncAdmission is the form with awaiting.
"""

from __future__ import annotations

import dataclasses
import heapq
import math

from shoal.router.admission.completion_rate import CompletionRate
from shoal.router.admission.entry import Entry, EntryState
from shoal.router.admission.fair_share import FairShare

# Stale deadlines that the heap may hold beyond as many as entries wait.
_SLACK = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """What may wait: this many entries, and these bytes in all of them."""

    max_waiting: int = 1024
    max_waiting_bytes: int = 256 * 1024 * 1024


class AdmissionQueue:
    """At every admission at most `capacity` are admitted; never more waits than the limits say.

    Every call that changes something returns the *other* entries whose wait it ended, with their new state: ADMITTED,
    EXPIRED, or REFUSED when a newcomer with a better claim took their place, or the queue was closed.
    """

    def __init__(self, capacity: int, limits: QueueLimits | None = None) -> None:
        self.capacity = capacity
        self.limits = limits or QueueLimits()
        self.num_running = 0
        self.closed = False
        self._waiting = FairShare()
        self._rate = CompletionRate()
        self._deadlines: list[tuple[float, int, Entry]] = []
        self._number = 0
        self._num_reserved = self._reserved_bytes = 0

    @property
    def num_waiting(self) -> int:
        return self._waiting.num_waiting + self._num_reserved

    @property
    def waiting_bytes(self) -> int:
        return self._waiting.waiting_bytes + self._reserved_bytes

    def reserve(self, num_bytes: int) -> bool:
        """Take room for a request that waits for something else before it can be offered, if there is any."""
        self._num_reserved += 1
        self._reserved_bytes += num_bytes
        if self.closed or not self._fits():
            self.unreserve(num_bytes)
            return False
        return True

    def unreserve(self, num_bytes: int) -> None:
        """It does not wait any more, or is offered now."""
        self._num_reserved -= 1
        self._reserved_bytes -= num_bytes

    def offer(self, entry: Entry, now: float) -> list[Entry]:
        """A new request. Its `state` afterwards: ADMITTED, QUEUED, or REFUSED with `retry_after`.

        When the queue is full, one of lower priority, or of a key that takes up more of it, makes room.
        """
        assert entry.state is EntryState.NEW and entry.weight > 0, f"{entry} cannot be offered"
        self._number += 1
        entry.number, entry.offered_at, entry.deadline = self._number, now, now + entry.max_wait
        changed = self._expire(now)
        if self.closed:
            self._end(entry, EntryState.REFUSED, now)
            return changed
        entry.state = EntryState.QUEUED
        self._waiting.push(entry)
        changed += [other for other in self._dispatch(now) if other is not entry]
        if entry.state is EntryState.QUEUED:
            if not self._fits():
                limits = self.limits
                could_fit = limits.max_waiting > 0 and entry.num_bytes <= limits.max_waiting_bytes
                displaced = self._waiting.displace(entry, self._share, self._fits) if could_fit else []
                for other in displaced:
                    self._end(other, EntryState.REFUSED, now)
                changed += displaced
                if not displaced:
                    self._waiting.remove(entry)
                    self._end(entry, EntryState.REFUSED, now)
                    return changed
            self._remember_deadline(entry)
        return changed

    def release(self, entry: Entry, now: float) -> list[Entry]:
        """An admitted request has ended: RELEASED. Others may be admitted in its place."""
        assert entry.state is EntryState.ADMITTED, f"{entry} was not admitted"
        entry.state = EntryState.RELEASED
        self.num_running -= 1
        self._waiting.ended(entry)
        self._rate.add(now)
        return self.expire(now)

    def cancel(self, entry: Entry, now: float) -> list[Entry]:
        """Its client went away. One that waits is CANCELLED, one that runs is released, others are left as they are."""
        if entry.state is EntryState.ADMITTED:
            return self.release(entry, now)
        if entry.state is EntryState.QUEUED:
            self._waiting.remove(entry)
            entry.state = EntryState.CANCELLED
            return self.expire(now)
        return []

    def expire(self, now: float) -> list[Entry]:
        """The entries that have waited for as long as they may: EXPIRED, with `retry_after`."""
        # Who leaves may have stood before others of its key that have a higher `max_concurrent`: those may go now.
        return self._expire(now) + self._dispatch(now)

    def set_capacity(self, capacity: int, now: float) -> list[Entry]:
        """From now on that many at once. What runs goes on, even when it is more."""
        self.capacity = capacity
        return self.expire(now)

    def close(self, now: float) -> list[Entry]:
        """The router ends: everything that waits is REFUSED, and all that comes."""
        self.closed = True
        waiting = list(self._waiting)
        for entry in waiting:
            self._waiting.remove(entry)
            self._end(entry, EntryState.REFUSED, now)
        self._deadlines.clear()
        return waiting

    def next_deadline(self) -> float | None:
        """When `expire` has something to do next; None while nothing waits that would expire."""
        while self._deadlines and self._deadlines[0][2].state is not EntryState.QUEUED:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def retry_after(self, now: float) -> float:
        """Seconds until a request that comes now could go, at the rate of completion of late."""
        return self._rate.seconds_for(self.num_waiting + 1, now)

    def _expire(self, now: float) -> list[Entry]:
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            entry = heapq.heappop(self._deadlines)[2]
            if entry.state is EntryState.QUEUED:
                self._waiting.remove(entry)
                self._end(entry, EntryState.EXPIRED, now)
                expired.append(entry)
        return expired

    def _dispatch(self, now: float) -> list[Entry]:
        admitted: list[Entry] = []
        while self.num_running < self.capacity and (entry := self._waiting.pop()) is not None:
            self.num_running += 1
            entry.state = EntryState.ADMITTED
            entry.waited = now - entry.offered_at
            admitted.append(entry)
        return admitted

    def _end(self, entry: Entry, state: EntryState, now: float) -> None:
        entry.state = state
        entry.retry_after = self.retry_after(now)

    def _fits(self) -> bool:
        return self.num_waiting <= self.limits.max_waiting and self.waiting_bytes <= self.limits.max_waiting_bytes

    def _share(self, num_waiting: int, num_bytes: int) -> float:
        """The part of the queue's places or of its bytes, whichever is larger."""
        places = num_waiting / max(self.limits.max_waiting, 1)
        return max(places, num_bytes / max(self.limits.max_waiting_bytes, 1))

    def _remember_deadline(self, entry: Entry) -> None:
        if entry.deadline == math.inf:
            return
        if len(self._deadlines) > 2 * self.num_waiting + _SLACK:
            self._deadlines = [item for item in self._deadlines if item[2].state is EntryState.QUEUED]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (entry.deadline, entry.number, entry))
