"""The queue of requests that wait for a slot, by key: (priority, arrival). Preempted ones keep their place.

Those that hold blocks already, filled from outside, come first: everybody else may be waiting for just these blocks.
"""

from __future__ import annotations

import heapq

from shoal.scheduling.request_state import RequestState, RequestStatus


class WaitingQueue:
    """A heap with lazy removal: a finished request is skipped when it comes up."""

    def __init__(self) -> None:
        self._heap: list[tuple[bool, tuple[int, int], RequestState]] = []
        self._num_waiting = 0
        self._num_tokens = 0

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, request: RequestState) -> None:
        heapq.heappush(self._heap, (not request.external_ready, request.key, request))
        self._num_waiting += 1
        request.num_queued = len(request.token_ids) - request.num_computed
        self._num_tokens += request.num_queued

    def peek(self) -> RequestState | None:
        while self._heap:
            request = self._heap[0][2]
            if request.status is not RequestStatus.FINISHED:
                return request
            heapq.heappop(self._heap)
        return None

    def pop(self) -> RequestState:
        request = self.peek()
        assert request is not None
        heapq.heappop(self._heap)
        self.forget(request)
        return request

    def forget(self, request: RequestState) -> None:
        """A waiting request has just been finished or taken: it no longer counts."""
        self._num_waiting -= 1
        self._num_tokens -= request.num_queued

    def num_tokens_of(self, count: int) -> int:
        """Tokens of the next `count` requests, as if all were of one length; prefix hits are not known yet."""
        return self._num_tokens * min(count, self._num_waiting) // self._num_waiting if self._num_waiting else 0
