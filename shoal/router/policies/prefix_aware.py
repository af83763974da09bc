"""prefix-aware: to the backend that has most of the prompt in its cache, within the bound on load."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from shoal.router.policies.base import BackendView, Policy, PolicyOptions, RequestView
from shoal.router.policies.load_bound import RecentWork, within_bound
from shoal.router.policies.prefix_table import PrefixTable
from shoal.router.policies.prompt import BLOCK_BYTES
from shoal.router.policies.turns import Turns, effective_weights, least

# Matches that differ by less than this part of the prompt are equally good: the load decides.
_GRAINS = 16
# Requests by which a backend's recent work may be above its bound.
_RECENT_ALLOWANCE = 4


class PrefixAware(Policy):
    """What each backend has cached is predicted from what was sent there, and corrected by what it reports.

    A backend that is over the bound is not chosen for what it has: the request goes to the one with the least
    outstanding tokens, which then has it as well, so a hot prefix spreads over as many backends as its load needs.
    Two loads are bounded: outstanding tokens, and for a backend that has any also its recent work, so that none does
    more than its share for long. New prefixes go to the least loaded, on a tie to the one with the least recent work.
    """

    needs_blocks = True
    used_options = frozenset({"by_speed", "load_factor", "max_blocks"})

    def __init__(self, options: PolicyOptions, random: Random) -> None:
        super().__init__(options, random)
        self._tables: dict[str, PrefixTable] = {}
        self._recent = RecentWork()
        self._turns = Turns()

    def pick(self, request: RequestView, candidates: Sequence[BackendView]) -> int:
        weights = effective_weights(candidates, self.options.by_speed)
        outstanding = [backend.outstanding_tokens for backend in candidates]
        recent = self._recent.of(candidates)
        indices: Sequence[int] = range(len(candidates))
        grains = self._grains(request, candidates)
        if max(grains) > 0:
            holders = self._allowed(request, outstanding, recent, weights)
            best = max((grains[index] for index in holders), default=0)
            if best > 0:
                indices = [index for index in holders if grains[index] == best]
        for loads in (outstanding, recent):
            indices = [indices[position] for position in least([loads[index] / weights[index] for index in indices])]
        return self._turns.take(candidates, indices, weights)

    def started(self, key: str, request: RequestView) -> None:
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = PrefixTable(self.options.max_blocks)
        table.start(request.request_id, request.blocks)
        self._recent.add(key, request.num_tokens)

    def finished(
        self,
        key: str,
        request: RequestView,
        num_cached_tokens: int | None,
        num_prompt_tokens: int | None,
        seconds: float,
    ) -> None:
        table = self._tables.get(key)
        if table is None:
            return  # it was removed meanwhile
        num_cached_blocks = None
        if num_cached_tokens is not None and num_prompt_tokens:
            # Tokens are spread over the bytes evenly enough for this.
            num_cached_blocks = num_cached_tokens / num_prompt_tokens * request.num_prompt_bytes / BLOCK_BYTES
        table.finish(request.request_id, num_cached_blocks)

    def removed(self, key: str) -> None:
        self._tables.pop(key, None)
        self._recent.forget(key)
        self._turns.forget(key)

    def _grains(self, request: RequestView, candidates: Sequence[BackendView]) -> list[int]:
        """How good each one's match is, in steps of a sixteenth of the prompt; less than a step is none."""
        step = max(len(request.blocks) / _GRAINS, 1.0)
        grains = []
        for backend in candidates:
            table = self._tables.get(backend.key)
            grains.append(0 if table is None else int(table.match(request.blocks) * table.trust / step))
        return grains

    def _allowed(
        self, request: RequestView, outstanding: Sequence[int], recent: Sequence[float], weights: Sequence[float]
    ) -> list[int]:
        """Those that may be chosen for what they have."""
        factor = self.options.load_factor
        now = within_bound(outstanding, weights, factor, request.num_tokens)
        lately = within_bound(recent, weights, factor, _RECENT_ALLOWANCE * self._recent.mean_request)
        return [index for index, load in enumerate(outstanding) if now[index] and (lately[index] or load == 0)]
