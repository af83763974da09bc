"""One token a row by temperature, min_p, top_k and top_p, and counter-based noise. Called by the sampler.

Shapes: G rows of a group, V vocabulary, K candidates.

Rows are grouped by what they need, because the costs differ: neither top_k nor top_p (a race over the vocabulary, no
ordering), top_k (K is the largest one in the group), top_p alone (K grows until the mass is there).

A row's token is a function of that row alone, bit for bit, whatever its group holds: maxima are exact, masses are
summed as integers (any order gives the same sum), everything else is elementwise.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.sampling.ordering import best_candidates, distances_to_best, ordering_keys
from shoal.sampling.random import negative_exponentials
from shoal.sampling.rows import take_rows

# A weight is relative to the row's best token, so at most 1: the sum of a vocabulary below 2**22 fits in 63 bits.
_MASS_SCALE = 2.0**40
_FIRST_NUM_CANDIDATES = 256
_CANDIDATE_GROWTH = 16


class DrawKind(enum.Enum):
    """The work that a row needs."""

    WHOLE_VOCABULARY = enum.auto()
    TOP_K = enum.auto()
    TOP_P = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawGroup:
    """Rows of a step that are drawn in one way. Parameters are [G, 1]; None where no row of the group uses one.

    keys: where this group's row keys lie among the keys of the step. max_top_k: the largest top_k of the group.
    """

    kind: DrawKind
    rows: Tensor | None
    keys: slice
    temperature: Tensor | None
    min_p: Tensor | None
    top_p: Tensor | None
    top_k: Tensor | None
    max_top_k: int


def draw(logits: Tensor, group: DrawGroup, row_keys: Tensor, hashed_ids: Tensor) -> Tensor:
    """Token ids int64 [G]. logits [R, V] of the step, overwritten; row_keys int32 [G]; hashed_ids int32 [V]."""
    scaled = take_rows(logits, group.rows)
    if group.temperature is not None:
        scaled.div_(group.temperature)
    if group.kind is DrawKind.WHOLE_VOCABULARY:
        return _draw_from_vocabulary(scaled, group, row_keys, hashed_ids)
    if group.kind is DrawKind.TOP_K:
        token_ids, weights = _top_k_candidates(scaled, group)
    else:
        token_ids, weights = _top_p_candidates(scaled, group)
    winners = _race(weights, row_keys, hashed_ids[token_ids])
    return token_ids.gather(1, winners.unsqueeze(1)).squeeze(1)


def _draw_from_vocabulary(scaled: Tensor, group: DrawGroup, row_keys: Tensor, hashed_ids: Tensor) -> Tensor:
    weights = scaled.sub_(scaled.amax(dim=-1, keepdim=True)).exp_()
    if group.min_p is not None:
        weights.masked_fill_(weights < group.min_p, 0.0)
    return _race(weights, row_keys, hashed_ids)


def _race(weights: Tensor, row_keys: Tensor, hashed_ids: Tensor) -> Tensor:
    """Columns int64 [G], drawn in proportion to weights [G, V or K], which are overwritten."""
    return weights.div_(negative_exponentials(row_keys, hashed_ids)).argmin(dim=-1)


def _top_k_candidates(scaled: Tensor, group: DrawGroup) -> tuple[Tensor, Tensor]:
    """Token ids and weights [G, K], best first; what min_p, top_k and top_p cut off has weight 0."""
    token_ids, distances = best_candidates(ordering_keys(distances_to_best(scaled)), group.max_top_k)
    weights = distances.neg_().exp_()
    assert group.top_k is not None
    ranks = torch.arange(weights.shape[1], device=weights.device)
    weights.masked_fill_(ranks >= group.top_k, 0.0)
    if group.min_p is not None:
        weights.masked_fill_(weights < group.min_p, 0.0)
    if group.top_p is not None:
        masses = _masses(weights)
        _cut_beyond_top_p(weights, masses, masses.sum(dim=-1, keepdim=True), group.top_p)
    return token_ids, weights


def _top_p_candidates(scaled: Tensor, group: DrawGroup) -> tuple[Tensor, Tensor]:
    """The same without top_k: the mass is that of the vocabulary, and how many tokens hold it is not known before."""
    assert group.top_p is not None
    distances = distances_to_best(scaled)
    keys = ordering_keys(distances)
    all_weights = distances.neg_().exp_()
    if group.min_p is not None:
        all_weights.masked_fill_(all_weights < group.min_p, 0.0)
    total = _masses(all_weights).sum(dim=-1, keepdim=True)
    vocab_size = keys.shape[1]
    # Looking whether the mass is there makes the host wait for a GPU, but costs nothing on the CPU.
    num_candidates = min(_FIRST_NUM_CANDIDATES, vocab_size) if scaled.device.type == "cpu" else vocab_size
    while True:
        token_ids, best_distances = best_candidates(keys, num_candidates)
        weights = best_distances.neg_().exp_()
        if group.min_p is not None:
            weights.masked_fill_(weights < group.min_p, 0.0)
        masses = _masses(weights)
        if num_candidates == vocab_size or bool((masses.sum(dim=-1, keepdim=True) >= group.top_p * total).all()):
            _cut_beyond_top_p(weights, masses, total, group.top_p)
            return token_ids, weights
        num_candidates = min(num_candidates * _CANDIDATE_GROWTH, vocab_size)


def _masses(weights: Tensor) -> Tensor:
    """Weights as integers in units of 2**-40 of the best token's: sums do not depend on the order of summation."""
    return (weights * _MASS_SCALE).to(torch.int64)


def _cut_beyond_top_p(weights: Tensor, masses: Tensor, total: Tensor, top_p: Tensor) -> None:
    """Zero the weights of tokens before which top_p of the total mass is reached. The best token always stays."""
    mass_before = masses.cumsum(dim=-1).sub_(masses)
    weights.masked_fill_(mass_before >= top_p * total, 0.0)
