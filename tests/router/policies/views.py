"""Backends and requests as policies see them, and the counts that a router keeps of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from random import Random

from shoal.router.policies import BackendView, Policy, PolicyOptions, RequestView, create_policy


def backends(*weights: float) -> list[BackendView]:
    """Named a, b, c, ...; without weights four equal ones."""
    return [BackendView("abcdefgh"[index], weight) for index, weight in enumerate(weights or (1.0,) * 4)]


def policy(name: str, **options: object) -> Policy:
    return create_policy(name, PolicyOptions(**options), Random(7))


_numbers = iter(range(10**9))


def request(
    blocks: Sequence[int] = (), session: str | None = None, num_prompt_tokens: int = 100, num_output_tokens: int = 20
) -> RequestView:
    return RequestView(
        f"request-{next(_numbers)}", session, tuple(blocks), len(blocks) * 256, num_prompt_tokens, num_output_tokens
    )


class Counts:
    """Sends requests through a policy and keeps the counts of the backends."""

    def __init__(self, policy: Policy, views: list[BackendView]) -> None:
        self.policy = policy
        self.views = views
        self.running: deque[tuple[BackendView, RequestView]] = deque()

    def send(self, request: RequestView, candidates: Sequence[BackendView] | None = None) -> BackendView:
        candidates = self.views if candidates is None else candidates
        chosen = candidates[self.policy.pick(request, candidates)]
        chosen.num_running += 1
        chosen.outstanding_tokens += request.num_tokens
        self.policy.started(chosen.key, request)
        self.running.append((chosen, request))
        return chosen

    def end(self, cached: float | None = None, index: int = 0) -> None:
        """The request at `index` ends; cached: the part of its prompt that the server had, if it says so."""
        backend, request = self.running[index]
        del self.running[index]
        backend.num_running -= 1
        backend.outstanding_tokens -= request.num_tokens
        num_cached = None if cached is None else round(cached * request.num_prompt_tokens)
        self.policy.finished(backend.key, request, num_cached, request.num_prompt_tokens, 1.0)

    def serve(self, request: RequestView, cached: float | None = None) -> str:
        """One that ends before the next one comes; the key of its backend."""
        chosen = self.send(request)
        self.end(cached, len(self.running) - 1)
        return chosen.key
