"""least-connections: the one with the fewest requests for its weight."""

from __future__ import annotations

from shoal.router.policies.base import BackendView
from shoal.router.policies.least_cost import LeastCost


class LeastConnections(LeastCost):
    def cost(self, backend: BackendView) -> float:
        return backend.num_running
