"""power-of-two: of two drawn at random the one with fewer outstanding tokens for its weight."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.router.policies.base import BackendView, Policy, RequestView
from shoal.router.policies.turns import effective_weights


class PowerOfTwo(Policy):
    """Nearly as even as looking at all, and routers that do not know of each other do not all choose the same one."""

    used_options = frozenset({"by_speed"})

    def pick(self, request: RequestView, candidates: Sequence[BackendView]) -> int:
        if len(candidates) == 1:
            return 0
        first, second = self.random.sample(range(len(candidates)), 2)
        weights = effective_weights(candidates, self.options.by_speed)

        costs = [candidates[index].outstanding_tokens / weights[index] for index in (first, second)]
        if costs[0] == costs[1]:
            return first if self.random.random() * (weights[first] + weights[second]) < weights[first] else second
        return first if costs[0] < costs[1] else second
