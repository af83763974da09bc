"""What a list of slots asks of the sampler, gathered once and kept while the list stays. Built by SamplingState.

A step adds only what depends on positions: the keys of the random rows and the rows still below min_tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.distributed.vocabulary import VocabularySlice
from shoal.kernels.support import has_kernels
from shoal.sampling.draws import DrawGroup, DrawKind
from shoal.sampling.logprobs import LogprobRows
from shoal.sampling.masks import AllowedRows, Biases, flat_index
from shoal.sampling.penalties import PenaltyRows
from shoal.sampling.rows import upload, upload_rows
from shoal.sampling.slots import GREEDY, NO_LOGPROBS, NO_PENALTIES, TOP_P_OFF, SlotTable

_Integers = npt.NDArray[np.int64]
_NO_ROWS: _Integers = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRows:
    """Rows that are greedy or drawn from the whole vocabulary, where one kernel serves both: `rows` as in
    shoal.sampling.rows; temperature (0: greedy) and min_p fp32 [G]. has_keys: some draw; then the first G keys of the
    step are those of these rows."""

    rows: Tensor | None
    temperature: Tensor
    min_p: Tensor
    has_keys: bool
    uses_min_p: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncatedRows:
    """Rows with top_k or top_p, where kernels serve both: temperature and min_p fp32, top_p fp64, top_k int64 (0: off),
    all [G]; `keys` as in DrawGroup."""

    rows: Tensor | None
    keys: slice
    temperature: Tensor
    min_p: Tensor
    top_p: Tensor
    top_k: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    """The rows of a step by feature; None or empty where no row uses a feature.

    choice, truncated: on a GPU with kernels, in place of greedy rows and draw groups.
    draw_rows: rows with a key, in the order of the groups and of the step's keys; mixed_seeds: their seeds.
    minimum_rows: rows that suppress their end_token_ids while their position is below first_free_positions.
    """

    num_rows: int
    vocabulary: VocabularySlice
    device: torch.device
    choice: ChoiceRows | None
    truncated: TruncatedRows | None
    has_greedy: bool
    greedy_rows: Tensor | None
    draw_groups: list[DrawGroup]
    draw_rows: _Integers
    mixed_seeds: npt.NDArray[np.uint64]
    allowed: AllowedRows | None
    banned: Tensor | None
    biases: Biases | None
    penalties: PenaltyRows | None
    logprobs: LogprobRows | None
    minimum_rows: _Integers
    first_free_positions: _Integers
    end_token_ids: list[list[int]]

    @property
    def only_chooses(self) -> bool:
        """Whether the choice kernel sees to all rows, and nothing else reads or changes their logits (but for what
        depends on positions, and grammars)."""
        others = (self.allowed, self.banned, self.biases, self.penalties, self.logprobs)
        return self.choice is not None and self.choice.rows is None and all(other is None for other in others)

    def suppressed(self, below_minimum: npt.NDArray[np.bool_]) -> Tensor | None:
        """Flat index of the end tokens of those minimum_rows that are still below their minimum."""
        pairs = [(int(self.minimum_rows[i]), self.end_token_ids[i]) for i in np.flatnonzero(below_minimum)]
        return flat_index(pairs, self.vocabulary, self.device)


def build_plan(table: SlotTable, slots: _Integers) -> SamplingPlan:
    """slots[i] is the slot of row i."""
    kinds = table.kind[slots]
    assert bool((kinds >= GREEDY).all()), f"no request in slots {slots[kinds < GREEDY].tolist()}"
    greedy = np.flatnonzero(kinds == GREEDY)
    minimum = np.flatnonzero(table.has_minimum[slots])
    choice: ChoiceRows | None = None
    truncated: TruncatedRows | None = None
    draw_groups: list[DrawGroup] = []
    if has_kernels(table.device):
        greedy = _NO_ROWS
        choice, choice_rows = _choice_rows(table, slots, kinds)
        truncated, truncated_rows = _truncated_rows(table, slots, kinds, choice_rows.size)
        draw_rows = np.concatenate([choice_rows, truncated_rows])
    else:
        draw_groups, draw_rows = _draw_groups(table, slots, kinds)
    return SamplingPlan(
        num_rows=len(slots),
        vocabulary=table.vocabulary,
        device=table.device,
        choice=choice,
        truncated=truncated,
        has_greedy=bool(greedy.size),
        greedy_rows=upload_rows(greedy, len(slots), table.device),
        draw_groups=draw_groups,
        draw_rows=draw_rows,
        mixed_seeds=table.mixed_seed[slots[draw_rows]],
        allowed=_allowed_rows(table, slots),
        banned=_banned_index(table, slots),
        biases=_biases(table, slots),
        penalties=_penalty_rows(table, slots),
        logprobs=_logprob_rows(table, slots),
        minimum_rows=minimum,
        first_free_positions=table.first_free_position[slots[minimum]],
        end_token_ids=[table.end_token_ids[slot] for slot in slots[minimum]],
    )


def _choice_rows(table: SlotTable, slots: _Integers, kinds: _Integers) -> tuple[ChoiceRows | None, _Integers]:
    """These rows, and those of them that have keys: all or none."""
    rows = np.flatnonzero((kinds == GREEDY) | (kinds == DrawKind.WHOLE_VOCABULARY.value))
    if not rows.size:
        return None, _NO_ROWS
    draws = kinds[rows] != GREEDY
    min_p = np.where(draws, table.min_p[slots[rows]], np.float32(0))
    choice = ChoiceRows(
        rows=upload_rows(rows, len(slots), table.device),
        temperature=upload(np.where(draws, table.temperature[slots[rows]], np.float32(0)), table.device),
        min_p=upload(min_p, table.device),
        has_keys=bool(draws.any()),
        uses_min_p=bool(min_p.any()),
    )
    return choice, rows if choice.has_keys else _NO_ROWS


def _truncated_rows(
    table: SlotTable, slots: _Integers, kinds: _Integers, num_keys_before: int
) -> tuple[TruncatedRows | None, _Integers]:
    rows = np.flatnonzero((kinds == DrawKind.TOP_K.value) | (kinds == DrawKind.TOP_P.value))
    if not rows.size:
        return None, _NO_ROWS
    members, device = slots[rows], table.device
    truncated = TruncatedRows(
        rows=upload_rows(rows, len(slots), device),
        keys=slice(num_keys_before, num_keys_before + rows.size),
        temperature=upload(table.temperature[members], device),
        min_p=upload(table.min_p[members], device),
        top_p=upload(table.top_p[members], device),
        top_k=upload(table.top_k[members], device),
    )
    return truncated, rows


def _draw_groups(table: SlotTable, slots: _Integers, kinds: _Integers) -> tuple[list[DrawGroup], _Integers]:
    groups: list[DrawGroup] = []
    draw_rows = [_NO_ROWS]
    num_keys = 0
    for kind in DrawKind:
        rows = np.flatnonzero(kinds == kind.value)
        if not rows.size:
            continue
        members = slots[rows]
        groups.append(
            DrawGroup(
                kind=kind,
                rows=upload_rows(rows, len(slots), table.device),
                keys=slice(num_keys, num_keys + rows.size),
                temperature=_column(table.temperature[members], 1.0, table.device),
                min_p=_column(table.min_p[members], 0.0, table.device),
                top_p=_column(table.top_p[members], TOP_P_OFF, table.device),
                top_k=_column(table.top_k[members], 0, table.device),
                max_top_k=int(table.top_k[members].max()),
            )
        )
        draw_rows.append(rows)
        num_keys += rows.size
    return groups, np.concatenate(draw_rows)


def _column(values: npt.NDArray[np.generic], off: float, device: torch.device) -> Tensor | None:
    """One value a row, [G, 1]; None where all are off."""
    return None if bool((values == off).all()) else upload(values.reshape(-1, 1), device)


def _allowed_rows(table: SlotTable, slots: _Integers) -> AllowedRows | None:
    rows = np.flatnonzero(table.has_allowed[slots])
    if not rows.size:
        return None
    masks = [mask for slot in slots[rows] if (mask := table.banned[slot]) is not None]
    return AllowedRows(upload_rows(rows, len(slots), table.device), torch.stack(masks))


def _banned_index(table: SlotTable, slots: _Integers) -> Tensor | None:
    pairs = [(int(row), table.bad_token_ids[slots[row]]) for row in np.flatnonzero(table.has_bad[slots])]
    return flat_index(pairs, table.vocabulary, table.device)


def _biases(table: SlotTable, slots: _Integers) -> Biases | None:
    tokens = table.vocabulary.tokens
    biased = [
        (
            int(row),
            {id: value for id, value in table.logit_bias[slots[row]].items() if tokens.start <= id < tokens.stop},
        )
        for row in np.flatnonzero(table.has_bias[slots])
    ]
    index = flat_index([(row, list(biases)) for row, biases in biased], table.vocabulary, table.device)
    if index is None:
        return None
    values = [value for _, biases in biased for value in biases.values()]
    return Biases(index, upload(np.array(values, dtype=np.float32), table.device))


def _penalty_rows(table: SlotTable, slots: _Integers) -> PenaltyRows | None:
    rows = np.flatnonzero(table.penalty_row[slots] != NO_PENALTIES)
    if not rows.size:
        return None
    members = slots[rows]
    return PenaltyRows(
        rows=upload_rows(rows, len(slots), table.device),
        pool_rows=upload(table.penalty_row[members], table.device),
        repetition=_column(table.repetition[members], 1.0, table.device),
        presence=_column(table.presence[members], 0.0, table.device),
        frequency=_column(table.frequency[members], 0.0, table.device),
    )


def _logprob_rows(table: SlotTable, slots: _Integers) -> LogprobRows | None:
    rows = np.flatnonzero(table.num_logprobs[slots] != NO_LOGPROBS)
    if not rows.size:
        return None
    num_logprobs = table.num_logprobs[slots[rows]].tolist()
    return LogprobRows(len(slots), upload_rows(rows, len(slots), table.device), rows.tolist(), num_logprobs)
