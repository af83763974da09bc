"""Workload: what one engine core has to do, known from what was sent to it and what it answered. Used by replicas.py.

Kept here and not asked of the core, whose own numbers are a fraction of a second old: a burst would all go one way.
"""

from __future__ import annotations

import dataclasses

from shoal.messages import TokenDelta
from shoal.types.request import EngineRequest

# What a request costs another one beside it, in prompt tokens that must be computed first. One that has no token yet
# may need a place in the batch and blocks that are not there; one that has tokens takes a small share of each step.
_WAITING_COST = 1024
_RUNNING_COST = 256


@dataclasses.dataclass(slots=True)
class _Request:
    num_to_compute: int  # tokens of the prompt (and of a continuation); 0 once it has emitted
    num_to_come: int  # tokens it may still emit


class Workload:
    """The requests of one core that have not ended."""

    def __init__(self) -> None:
        self.num_waiting = 0  # without a token so far
        self._requests: dict[str, _Request] = {}
        self._num_to_compute = 0
        self._num_to_come = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    @property
    def cost(self) -> tuple[int, int]:
        """How busy the core is: comparable with another's. Equal costs are told apart by the tokens still to come."""
        num_running = len(self._requests) - self.num_waiting
        waiting = self.num_waiting * _WAITING_COST + self._num_to_compute
        return waiting + num_running * _RUNNING_COST, self._num_to_come

    def add(self, request: EngineRequest) -> None:
        """It is being sent to the core."""
        num_emitted = len(request.emitted_token_ids)
        num_to_come = max((request.sampling.max_tokens or 0) - num_emitted, 0)
        added = _Request(len(request.prompt_token_ids) + num_emitted, num_to_come)
        self._requests[request.request_id] = added
        self.num_waiting += 1
        self._num_to_compute += added.num_to_compute
        self._num_to_come += added.num_to_come

    def take(self, delta: TokenDelta) -> bool:
        """Count the core's news of a request. False when it is not here: it ended, and this crossed on the way."""
        request = self._requests.get(delta.request_id)
        if request is None:
            return False
        if delta.finish_reason is not None:
            self.drop(delta.request_id)
            return True
        num_tokens = min(len(delta.token_ids), request.num_to_come)
        request.num_to_come -= num_tokens
        self._num_to_come -= num_tokens
        if request.num_to_compute and delta.token_ids:
            self.num_waiting -= 1
            self._num_to_compute -= request.num_to_compute
            request.num_to_compute = 0
        return True

    def drop(self, request_id: str) -> None:
        """It has ended, or nobody wants it any more. Unknown ids are ignored."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        self.num_waiting -= request.num_to_compute > 0
        self._num_to_compute -= request.num_to_compute
        self._num_to_come -= request.num_to_come

    def drop_all(self) -> list[str]:
        """The ids of all requests, which are forgotten."""
        request_ids = list(self._requests)
        for request_id in request_ids:
            self.drop(request_id)
        return request_ids
