"""weighted-round-robin: turns in proportion to weights, spread evenly over a cycle."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from shoal.router.policies.base import BackendView, Policy, PolicyOptions, RequestView
from shoal.router.policies.turns import effective_weights


class WeightedRoundRobin(Policy):
    """Smooth, after the idea of nginx's: each pick gives everyone its weight in credit, and who has most pays for all.

    Weights 5, 1, 1 give a a b a c a a rather than a a a a a b c. Over sum(weights) picks of integer weights everyone
    has been picked exactly as often as its weight, and the credits are back at 0.
    """

    used_options = frozenset({"by_speed"})

    def __init__(self, options: PolicyOptions, random: Random) -> None:
        super().__init__(options, random)
        self._credits: dict[str, float] = {}

    def pick(self, request: RequestView, candidates: Sequence[BackendView]) -> int:
        weights = effective_weights(candidates, self.options.by_speed)
        credits = self._credits
        for backend, weight in zip(candidates, weights, strict=True):
            credits[backend.key] = credits.get(backend.key, 0.0) + weight
        chosen = max(range(len(candidates)), key=lambda index: credits[candidates[index].key])
        credits[candidates[chosen].key] -= sum(weights)
        return chosen

    def removed(self, key: str) -> None:
        self._credits.pop(key, None)
