"""least-outstanding-tokens: the one with the fewest tokens still to read and to write for its weight."""

from __future__ import annotations

from shoal.router.policies.base import BackendView
from shoal.router.policies.least_cost import LeastCost


class LeastOutstandingTokens(LeastCost):
    """A slow one's tokens stay, so it gets less."""

    def cost(self, backend: BackendView) -> float:
        return backend.outstanding_tokens
