"""LeastCost: what policies share that choose the backend with the least of something for its weight."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from random import Random

from shoal.router.policies.base import BackendView, Policy, PolicyOptions, RequestView
from shoal.router.policies.turns import Turns, effective_weights, least


class LeastCost(Policy):
    """Those that cost equally little, such as all that are idle, take turns by weight."""

    used_options = frozenset({"by_speed"})

    def __init__(self, options: PolicyOptions, random: Random) -> None:
        super().__init__(options, random)
        self._turns = Turns()

    @abc.abstractmethod
    def cost(self, backend: BackendView) -> float:
        """What it has to do, before its weight counts."""

    def pick(self, request: RequestView, candidates: Sequence[BackendView]) -> int:
        weights = effective_weights(candidates, self.options.by_speed)
        costs = [self.cost(backend) / weight for backend, weight in zip(candidates, weights, strict=True)]
        return self._turns.take(candidates, least(costs), weights)

    def removed(self, key: str) -> None:
        self._turns.forget(key)
