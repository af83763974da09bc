"""The bound on load that goes before affinity: consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam,
2018), over tokens instead of requests. Used by prefix-aware and session-affinity."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.router.policies.base import BackendView


def within_bound(loads: Sequence[float], weights: Sequence[float], factor: float, allowance: float) -> list[bool]:
    """Whether each may still be chosen for what it has: its load is at most `factor` times its share, + allowance.

    At least one always may: the one with the least load for its weight.
    """
    mean = sum(loads) / sum(weights)
    return [
        load <= max(factor * mean * weight + allowance, mean * weight)
        for load, weight in zip(loads, weights, strict=True)
    ]


class RecentWork:
    """Tokens sent to each backend of late, fading by requests instead of by time."""

    # Of each backend about the last 256 requests count.
    _MEMORY = 256

    def __init__(self) -> None:
        self._tokens: dict[str, float] = {}
        self._num_requests = 0.0
        self._total = 0.0

    def add(self, key: str, num_tokens: int) -> None:
        self._tokens.setdefault(key, 0.0)
        keep = 1 - 1 / (self._MEMORY * len(self._tokens))
        for other in self._tokens:
            self._tokens[other] *= keep
        self._tokens[key] += num_tokens
        self._num_requests = self._num_requests * keep + 1
        self._total = self._total * keep + num_tokens

    @property
    def mean_request(self) -> float:
        """Tokens of a request of late."""
        return self._total / self._num_requests if self._num_requests else 0.0

    def of(self, candidates: Sequence[BackendView]) -> list[float]:
        """One that is new begins with what the others have on average: it must not be flooded to catch up."""
        if any(backend.key not in self._tokens for backend in candidates):
            known = [
                self._tokens[backend.key] / backend.weight for backend in candidates if backend.key in self._tokens
            ]
            mean = sum(known) / len(known) if known else 0.0
            for backend in candidates:
                self._tokens.setdefault(backend.key, mean * backend.weight)
        return [self._tokens[backend.key] for backend in candidates]

    def forget(self, key: str) -> None:
        self._tokens.pop(key, None)
