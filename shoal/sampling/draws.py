"""One token a row by temperature, min_p, top_k and top_p, and counter-based noise. Called by the sampler.

Shapes: G rows of a group, V vocabulary, W width of this rank's slice of it, K candidates.

Rows are grouped by what they need, because the costs differ: neither top_k nor top_p (a race over the vocabulary, no
ordering), top_k (K is the largest one in the group), top_p alone (K grows until the mass is there).

A row's token is a function of that row alone, bit for bit, whatever its group holds: maxima are exact, masses are
summed as integers (any order gives the same sum), everything else is elementwise.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.distributed.vocabulary import VocabularySlice
from shoal.sampling.ordering import best_candidates, distances_to_best, ordering_keys
from shoal.sampling.random import negative_exponentials
from shoal.sampling.rows import num_rows_at_once

# A weight is relative to the row's best token, so at most 1: the sum of a vocabulary below 2**22 fits in 63 bits.
_MASS_SCALE = 2.0**40
_FIRST_NUM_CANDIDATES = 128
_CANDIDATE_GROWTH = 8


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

    def parameters_of(self, part: slice) -> DrawGroup:
        """The group cut to some of its rows, as far as parameters go."""
        return dataclasses.replace(
            self,
            temperature=_cut(self.temperature, part),
            min_p=_cut(self.min_p, part),
            top_p=_cut(self.top_p, part),
            top_k=_cut(self.top_k, part),
        )


def _cut(column: Tensor | None, part: slice) -> Tensor | None:
    return None if column is None else column[part]


def draw(logits: Tensor, group: DrawGroup, row_keys: Tensor, hashed_ids: Tensor) -> Tensor:
    """Token ids int64 [G]. logits [G, V] of the group, overwritten; row_keys int32 [G]; hashed_ids int32 [V]."""
    scaled = logits if group.temperature is None else logits.div_(group.temperature)
    num_at_once = num_rows_at_once(scaled)
    if scaled.shape[0] <= num_at_once:
        return _draw_part(scaled, group, row_keys, hashed_ids)
    parts = [slice(start, start + num_at_once) for start in range(0, scaled.shape[0], num_at_once)]
    return torch.cat(
        [_draw_part(scaled[part], group.parameters_of(part), row_keys[part], hashed_ids) for part in parts]
    )


def draw_together(
    logits: Tensor, group: DrawGroup, row_keys: Tensor, hashed_ids: Tensor, vocabulary: VocabularySlice
) -> tuple[Tensor, Tensor]:
    """The race of DrawKind.WHOLE_VOCABULARY, run by each rank among its own tokens: how fast its winners are, fp32 [G],
    and their columns, int64 [G]. logits [G, W], overwritten; hashed_ids int32 [W]. The fastest of all ranks' winners is
    what `draw` finds: all that ranks need to know of each other is the row's best logit.
    """
    scaled = logits if group.temperature is None else logits.div_(group.temperature)
    best = vocabulary.greatest(scaled.amax(dim=-1)).unsqueeze(1)
    num_at_once = num_rows_at_once(scaled)
    winners = []
    for start in range(0, scaled.shape[0], num_at_once):
        part = slice(start, start + num_at_once)
        weights = _weights(scaled[part], best[part], group.parameters_of(part))
        times = weights.div_(negative_exponentials(row_keys[part], hashed_ids))
        columns = times.argmin(dim=-1)
        winners.append((times.gather(1, columns.unsqueeze(1)).squeeze(1).neg_(), columns))
    speeds, columns = (torch.cat(tensors) for tensors in zip(*winners, strict=True))
    return speeds, columns


def _draw_part(scaled: Tensor, group: DrawGroup, row_keys: Tensor, hashed_ids: Tensor) -> Tensor:
    if group.kind is DrawKind.WHOLE_VOCABULARY:
        return _draw_from_vocabulary(scaled, group, row_keys, hashed_ids)
    if group.kind is DrawKind.TOP_K:
        return _draw_from_top_k(scaled, group, row_keys, hashed_ids)
    return _draw_from_top_p(scaled, group, row_keys, hashed_ids)


def _draw_from_vocabulary(scaled: Tensor, group: DrawGroup, row_keys: Tensor, hashed_ids: Tensor) -> Tensor:
    weights = _weights(scaled, scaled.amax(dim=-1, keepdim=True), group)
    return _race(weights, row_keys, hashed_ids)


def _weights(scaled: Tensor, best: Tensor, group: DrawGroup) -> Tensor:
    """scaled [G, V] with the best [G, 1] of each row -> weights relative to it, in place; 0 for what min_p cuts off."""
    weights = scaled.sub_(best).exp_()
    return weights if group.min_p is None else weights.masked_fill_(weights < group.min_p, 0.0)


def _race(weights: Tensor, row_keys: Tensor, hashed_ids: Tensor) -> Tensor:
    """Columns int64 [G], drawn in proportion to weights [G, V or K], which are overwritten."""
    return weights.div_(negative_exponentials(row_keys, hashed_ids)).argmin(dim=-1)


def _race_of_candidates(token_ids: Tensor, weights: Tensor, row_keys: Tensor, hashed_ids: Tensor) -> Tensor:
    """The same among the candidates token_ids [G, K]; returns token ids [G]."""
    columns = _race(weights, row_keys, hashed_ids[token_ids])
    return token_ids.gather(1, columns.unsqueeze(1)).squeeze(1)


def _draw_from_top_k(scaled: Tensor, group: DrawGroup, row_keys: Tensor, hashed_ids: Tensor) -> Tensor:
    # Candidates come best first; what min_p, top_k and top_p cut off gets weight 0.
    token_ids, distances = best_candidates(ordering_keys(distances_to_best(scaled)), group.max_top_k)
    weights = distances.neg_().exp_()
    assert group.top_k is not None
    ranks = torch.arange(weights.shape[1], device=weights.device)
    weights.masked_fill_(ranks >= group.top_k, 0.0)
    if group.min_p is not None:
        weights.masked_fill_(weights < group.min_p, 0.0)
    if group.top_p is not None:
        masses = _masses(weights)
        _cut_beyond_top_p(weights, masses, masses.sum(dim=-1, keepdim=True) * group.top_p)
    return _race_of_candidates(token_ids, weights, row_keys, hashed_ids)


def _draw_from_top_p(scaled: Tensor, group: DrawGroup, row_keys: Tensor, hashed_ids: Tensor) -> Tensor:
    """Without top_k the mass is that of the vocabulary, and how many tokens hold top_p of it is not known before."""
    assert group.top_p is not None
    distances = distances_to_best(scaled)
    keys = ordering_keys(distances)
    weights = distances.neg_().exp_()
    if group.min_p is not None:
        weights.masked_fill_(weights < group.min_p, 0.0)
    wanted_mass = _masses(weights).sum(dim=-1, keepdim=True) * group.top_p
    if scaled.device.type == "cpu":
        return _draw_in_rounds(weights, keys, wanted_mass, row_keys, hashed_ids)
    # Asking whether fewer candidates hold the mass would make the host wait for the device: order them all.
    token_ids, _ = best_candidates(keys, keys.shape[1])
    weights = weights.gather(1, token_ids)
    _cut_beyond_top_p(weights, _masses(weights), wanted_mass)
    return _race_of_candidates(token_ids, weights, row_keys, hashed_ids)


def _draw_in_rounds(weights: Tensor, keys: Tensor, wanted_mass: Tensor, row_keys: Tensor, hashed_ids: Tensor) -> Tensor:
    """For the CPU, where a look at the masses costs nothing: few candidates first, more for the rows that need them."""
    num_rows, vocab_size = weights.shape
    drawn = torch.empty(num_rows, dtype=torch.int64)
    rows = torch.arange(num_rows)
    num_candidates = min(_FIRST_NUM_CANDIDATES, vocab_size)
    while rows.numel():
        token_ids, _ = best_candidates(keys, num_candidates)
        candidates = weights.gather(1, token_ids)
        masses = _masses(candidates)
        # A row of NaN never has enough: it ends with the whole vocabulary.
        enough = masses.sum(dim=-1) >= wanted_mass.squeeze(1) if num_candidates < vocab_size else rows >= 0
        _cut_beyond_top_p(candidates, masses, wanted_mass)
        chosen = _race_of_candidates(token_ids, candidates, row_keys, hashed_ids)
        drawn[rows[enough]] = chosen[enough]
        short = ~enough
        rows, weights, keys = rows[short], weights[short], keys[short]
        wanted_mass, row_keys = wanted_mass[short], row_keys[short]
        num_candidates = min(num_candidates * _CANDIDATE_GROWTH, vocab_size)
    return drawn


def _masses(weights: Tensor) -> Tensor:
    """Weights as integers in units of 2**-40 of the best token's: sums do not depend on the order of summation."""
    return (weights * _MASS_SCALE).to(torch.int64)


def _cut_beyond_top_p(weights: Tensor, masses: Tensor, wanted_mass: Tensor) -> None:
    """Zero the weights [G, K], best first, of tokens before which wanted_mass [G, 1] is reached; the best one stays."""
    mass_before = masses.cumsum(dim=-1).sub_(masses)
    weights.masked_fill_(mass_before >= wanted_mass, 0.0)
