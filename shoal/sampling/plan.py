"""What a list of slots asks of the sampler, gathered once and kept while the list stays. Built by SamplingState.

A step adds only what depends on positions: the keys of the random rows and the rows still below min_tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.sampling.draws import DrawGroup, DrawKind
from shoal.sampling.logprobs import LogprobRows
from shoal.sampling.masks import AllowedRows, Biases, banned_row, flat_index
from shoal.sampling.penalties import PenaltyRows
from shoal.sampling.rows import upload, upload_column, upload_rows
from shoal.types.sampling_params import SamplingParams
from shoal.types.seeds import mix64, reduce_seed

# Above every possible mass: rows without top_p, in a group with others, are not cut at all.
_TOP_P_OFF = 2.0


class SlotSampling:
    """One running request as the sampler sees it."""

    def __init__(self, params: SamplingParams, num_prompt_tokens: int, vocab_size: int, device: torch.device) -> None:
        self.params = params
        self.greedy = params.greedy or params.top_k == 1
        assert self.greedy or params.seed is not None, "whoever accepts a request draws its seed"
        self.mixed_seed = mix64(reduce_seed(params.seed or 0))
        self.top_k = params.top_k if 0 < params.top_k < vocab_size else 0
        self.end_token_ids = [*params.eos_token_ids, *(params.stop_token_ids or ())]
        # Positions below this one may not hold an end token.
        self.first_free_position = num_prompt_tokens + params.min_tokens
        self.penalty_row: int | None = None
        allowed = params.allowed_token_ids
        self.banned: Tensor | None = None if allowed is None else banned_row(allowed, vocab_size, device)

    @property
    def kind(self) -> DrawKind:
        if self.top_k:
            return DrawKind.TOP_K
        return DrawKind.TOP_P if self.params.top_p < 1 else DrawKind.WHOLE_VOCABULARY


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    """The rows of a step by feature; None or empty where no row uses a feature.

    draw_rows: rows that draw, in the order of the groups and of the step's keys; mixed_seeds: their seeds, uint64.
    minimum_rows: rows that may have to suppress end tokens, where their position is below first_free_positions.
    """

    num_rows: int
    vocab_size: int
    device: torch.device
    has_greedy: bool
    greedy_rows: Tensor | None
    draw_groups: list[DrawGroup]
    draw_rows: npt.NDArray[np.int64]
    mixed_seeds: npt.NDArray[np.uint64]
    allowed: AllowedRows | None
    banned: Tensor | None
    biases: Biases | None
    penalties: PenaltyRows | None
    logprobs: LogprobRows | None
    minimum_rows: npt.NDArray[np.int64]
    first_free_positions: npt.NDArray[np.int64]
    end_token_ids: list[list[int]]

    def suppressed(self, below_minimum: npt.NDArray[np.bool_]) -> Tensor | None:
        """Flat index of the end tokens of those minimum_rows that are still below their minimum."""
        pairs = [(int(self.minimum_rows[i]), self.end_token_ids[i]) for i in np.flatnonzero(below_minimum)]
        return flat_index(pairs, self.vocab_size, self.device)


def build_plan(slots: Sequence[SlotSampling], vocab_size: int, device: torch.device) -> SamplingPlan:
    """slots[i] is the request of row i."""
    greedy = [row for row, slot in enumerate(slots) if slot.greedy]
    minimum = [row for row, slot in enumerate(slots) if slot.params.min_tokens > 0 and slot.end_token_ids]
    draw_groups, draw_rows = _draw_groups(slots, device)
    return SamplingPlan(
        num_rows=len(slots),
        vocab_size=vocab_size,
        device=device,
        has_greedy=bool(greedy),
        greedy_rows=upload_rows(greedy, len(slots), device),
        draw_groups=draw_groups,
        draw_rows=np.array(draw_rows, dtype=np.int64),
        mixed_seeds=np.array([slots[row].mixed_seed for row in draw_rows], dtype=np.uint64),
        allowed=_allowed_rows(slots, device),
        banned=flat_index([(row, slot.params.bad_words_token_ids or []) for row, slot in enumerate(slots)],
                          vocab_size, device),
        biases=_biases(slots, vocab_size, device),
        penalties=_penalty_rows(slots, device),
        logprobs=_logprob_rows(slots, device),
        minimum_rows=np.array(minimum, dtype=np.int64),
        first_free_positions=np.array([slots[row].first_free_position for row in minimum], dtype=np.int64),
        end_token_ids=[slots[row].end_token_ids for row in minimum],
    )


def _draw_groups(slots: Sequence[SlotSampling], device: torch.device) -> tuple[list[DrawGroup], list[int]]:
    groups: list[DrawGroup] = []
    all_rows: list[int] = []
    for kind in DrawKind:
        rows = [row for row, slot in enumerate(slots) if not slot.greedy and slot.kind is kind]
        if not rows:
            continue
        members = [slots[row] for row in rows]
        params = [slot.params for slot in members]
        top_ps = [_TOP_P_OFF if item.top_p == 1 else item.top_p for item in params]
        groups.append(DrawGroup(
            kind=kind,
            rows=upload_rows(rows, len(slots), device),
            keys=slice(len(all_rows), len(all_rows) + len(rows)),
            temperature=_column([item.temperature for item in params], 1.0, device),
            min_p=_column([item.min_p for item in params], 0.0, device),
            top_p=_column(top_ps, _TOP_P_OFF, device, np.float64),
            top_k=_column([slot.top_k for slot in members], 0, device, np.int64),
            max_top_k=max(slot.top_k for slot in members),
        ))
        all_rows.extend(rows)
    return groups, all_rows


def _column(
    values: Sequence[float], off: float, device: torch.device, dtype: npt.DTypeLike = np.float32
) -> Tensor | None:
    """One value a row, [G, 1]; None where all are off."""
    return None if all(value == off for value in values) else upload_column(values, device, dtype)


def _allowed_rows(slots: Sequence[SlotSampling], device: torch.device) -> AllowedRows | None:
    banned = [(row, slot.banned) for row, slot in enumerate(slots) if slot.banned is not None]
    if not banned:
        return None
    rows = upload_rows([row for row, _ in banned], len(slots), device)
    return AllowedRows(rows, torch.stack([mask for _, mask in banned]))


def _biases(slots: Sequence[SlotSampling], vocab_size: int, device: torch.device) -> Biases | None:
    pairs = [(row, slot.params.logit_bias) for row, slot in enumerate(slots) if slot.params.logit_bias]
    index = flat_index([(row, list(biases)) for row, biases in pairs], vocab_size, device)
    if index is None:
        return None
    values = [value for _, biases in pairs for value in biases.values()]
    return Biases(index, upload(np.array(values, dtype=np.float32), device))


def _penalty_rows(slots: Sequence[SlotSampling], device: torch.device) -> PenaltyRows | None:
    rows = [row for row, slot in enumerate(slots) if slot.penalty_row is not None]
    if not rows:
        return None
    members = [slots[row] for row in rows]

    def column(value_of: Callable[[SamplingParams], float], off: float) -> Tensor | None:
        return _column([value_of(slot.params) for slot in members], off, device)

    return PenaltyRows(
        rows=upload_rows(rows, len(slots), device),
        pool_rows=upload(np.array([slot.penalty_row for slot in members], dtype=np.int64), device),
        repetition=column(lambda params: params.repetition_penalty, 1.0),
        presence=column(lambda params: params.presence_penalty, 0.0),
        frequency=column(lambda params: params.frequency_penalty, 0.0),
    )


def _logprob_rows(slots: Sequence[SlotSampling], device: torch.device) -> LogprobRows | None:
    wanted = [(row, slot.params.logprobs) for row, slot in enumerate(slots) if slot.params.logprobs is not None]
    if not wanted:
        return None
    row_numbers = [row for row, _ in wanted]
    num_logprobs = [k for _, k in wanted]
    return LogprobRows(len(slots), upload_rows(row_numbers, len(slots), device), row_numbers, num_logprobs)
