"""session-affinity: a session stays with its backend, within the bound on load."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from random import Random

from shoal.router.policies.base import BackendView, Policy, PolicyOptions, RequestView
from shoal.router.policies.least_outstanding_tokens import LeastOutstandingTokens
from shoal.router.policies.load_bound import within_bound


class SessionAffinity(Policy):
    """Weighted rendezvous hashing (Thaler, Ravishankar, 1998): of all backends the one with the highest score wins.

    A backend's leaving moves only its own sessions, its return brings them back, and routers agree without talking.
    Weights are the configured ones: with measured speeds sessions would wander. Requests without a session go to the
    backend with the least outstanding tokens.
    """

    needs_session = True
    used_options = frozenset({"load_factor"})

    def __init__(self, options: PolicyOptions, random: Random) -> None:
        super().__init__(options, random)
        self._otherwise = LeastOutstandingTokens(PolicyOptions(), random)

    def pick(self, request: RequestView, candidates: Sequence[BackendView]) -> int:
        if request.session is None:
            return self._otherwise.pick(request, candidates)
        allowed = within_bound(
            [backend.outstanding_tokens for backend in candidates],
            [backend.weight for backend in candidates],
            self.options.load_factor,
            request.num_tokens,
        )
        indices = [index for index, is_allowed in enumerate(allowed) if is_allowed]
        return max(indices, key=lambda index: _score(request.session, candidates[index]))

    def removed(self, key: str) -> None:
        self._otherwise.removed(key)


def _score(session: str | None, backend: BackendView) -> tuple[float, str]:
    """Highest with a chance in proportion to the weight; the key tells apart what rounding made equal."""
    text = f"{session}\0{backend.key}".encode("utf-8", "surrogatepass")
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    uniform = (number + 1) / (2**64 + 2)
    # Rounding takes the largest numbers to 1, whose logarithm is 0.
    return backend.weight / max(-math.log(uniform), 1e-300), backend.key
