"""least-outstanding-tokens: the one with the fewest tokens still to read and to write for its weight."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from shoal.router.policies.base import BackendView, Policy, PolicyOptions, RequestView
from shoal.router.policies.turns import Turns, effective_weights, least


class LeastOutstandingTokens(Policy):
    """A slow one's tokens stay, so it gets less. Those with equally few, such as idle ones, take turns by weight."""

    used_options = frozenset({"by_speed"})

    def __init__(self, options: PolicyOptions, random: Random) -> None:
        super().__init__(options, random)
        self._turns = Turns()

    def pick(self, request: RequestView, candidates: Sequence[BackendView]) -> int:
        weights = effective_weights(candidates, self.options.by_speed)
        costs = [backend.outstanding_tokens / weight for backend, weight in zip(candidates, weights, strict=True)]
        return self._turns.take(candidates, least(costs), weights)

    def removed(self, key: str) -> None:
        self._turns.forget(key)
