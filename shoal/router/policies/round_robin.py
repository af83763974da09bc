"""round-robin: each in turn, whatever they have to do."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from shoal.router.policies.base import BackendView, Policy, PolicyOptions, RequestView
from shoal.router.policies.turns import Turns


class RoundRobin(Policy):
    """Everyone gets the same number of turns; a candidate that was away has none to catch up."""

    def __init__(self, options: PolicyOptions, random: Random) -> None:
        super().__init__(options, random)
        self._turns = Turns()

    def pick(self, request: RequestView, candidates: Sequence[BackendView]) -> int:
        return self._turns.take(candidates, range(len(candidates)), [1.0] * len(candidates))

    def removed(self, key: str) -> None:
        self._turns.forget(key)
