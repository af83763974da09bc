"""Repetition, presence and frequency penalties, and their counts. Owned by SamplingState, applied by the sampler.

Shapes: A rows with penalties in this step, W width of this rank's slice of the vocabulary, P rows of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.distributed.vocabulary import VocabularySlice
from shoal.sampling.rows import num_rows_at_once, put_rows, take_rows, upload


class PenaltyCounts:
    """How often each token occurs in the output of each request with penalties, and which occur in its prompt: of this
    rank's tokens.

    Memory: 5 bytes x W for each request that uses penalties at the same time; rows are made when first needed.
    """

    def __init__(self, vocabulary: VocabularySlice, device: torch.device) -> None:
        self.vocabulary = vocabulary
        self.device = device
        # int32 [P, W] and bool [P, W]
        self.output_counts = torch.zeros((0, vocabulary.width), dtype=torch.int32, device=device)
        self.in_prompt = torch.zeros((0, vocabulary.width), dtype=torch.bool, device=device)
        self._free_rows: list[int] = []

    def acquire(self, prompt_token_ids: list[int], output_token_ids: list[int]) -> int:
        """A row of the pool for a request that has these ids so far."""
        if not self._free_rows:
            self._grow()
        row = self._free_rows.pop()
        self.output_counts[row].zero_()
        self.in_prompt[row].fill_(False)
        prompt_columns, output_columns = self._columns(prompt_token_ids), self._columns(output_token_ids)
        if prompt_columns.size:
            self.in_prompt[row].index_fill_(0, upload(prompt_columns, self.device), True)
        if output_columns.size:
            # Counted on the host: a repeated id in one scatter would be an atomic addition on CUDA.
            columns, counts = np.unique(output_columns, return_counts=True)
            values = upload(counts.astype(np.int32), self.device)
            self.output_counts[row].index_copy_(0, upload(columns, self.device), values)
        return row

    def _columns(self, token_ids: list[int]) -> npt.NDArray[np.int64]:
        """Where those that are this rank's have their column."""
        ids = np.array(token_ids, dtype=np.int64)
        return ids if self.vocabulary.is_whole else ids[self.vocabulary.holds(ids)] - self.vocabulary.start

    def release(self, row: int) -> None:
        self._free_rows.append(row)

    def add(self, pool_rows: Tensor, token_ids: Tensor) -> None:
        """Count one more token for each of these pool rows. Both int64 [A]; nothing is read back."""
        vocabulary = self.vocabulary
        if vocabulary.is_whole:
            columns, increments = token_ids, torch.ones_like(token_ids, dtype=torch.int32)
        else:
            # Another rank's token adds 0 to some column.
            columns = (token_ids - vocabulary.start).clamp_(0, vocabulary.width - 1)
            increments = vocabulary.holds(token_ids).to(torch.int32)
        self.output_counts.view(-1).scatter_add_(0, pool_rows * vocabulary.width + columns, increments)

    def _grow(self) -> None:
        num_rows = self.output_counts.shape[0]
        num_more = max(1, num_rows)
        width = self.vocabulary.width
        self.output_counts = torch.cat([self.output_counts, self.output_counts.new_zeros(num_more, width)])
        self.in_prompt = torch.cat([self.in_prompt, self.in_prompt.new_zeros(num_more, width)])
        self._free_rows.extend(range(num_rows + num_more - 1, num_rows - 1, -1))


@dataclass(frozen=True, slots=True, kw_only=True)
class PenaltyRows:
    """The rows of a step that use penalties. Each factor is fp32 [A, 1], or None where no row uses it."""

    rows: Tensor | None
    pool_rows: Tensor
    repetition: Tensor | None
    presence: Tensor | None
    frequency: Tensor | None


def apply_penalties(logits: Tensor, group: PenaltyRows, counts: PenaltyCounts) -> None:
    """Change logits [R, W] in place: repetition (CTRL, arXiv:1909.05858), then frequency and presence (OpenAI API)."""
    penalized = take_rows(logits, group.rows)
    num_at_once = num_rows_at_once(penalized)
    for start in range(0, penalized.shape[0], num_at_once):
        part = slice(start, start + num_at_once)
        _penalize(penalized[part], part, group, counts)
    put_rows(logits, group.rows, penalized)


def _penalize(penalized: Tensor, part: slice, group: PenaltyRows, counts: PenaltyCounts) -> None:
    """Change penalized, rows `part` of the group, in place.

    In float32 throughout: on the CPU a comparison or torch.where costs five times as much as an arithmetic pass.
    """
    pool_rows = group.pool_rows[part]
    output_counts = counts.output_counts.index_select(0, pool_rows).to(torch.float32)
    if group.repetition is not None:
        occurs = counts.in_prompt.index_select(0, pool_rows).to(torch.float32).add_(output_counts).clamp_(max=1.0)
        factor = occurs.mul_(group.repetition[part] - 1.0).add_(1.0)
        # One of the two terms is 0: logits above 0 are divided, those below are multiplied.
        divided = penalized.clamp(min=0.0).div_(factor)
        penalized.clamp_(max=0.0).mul_(factor).add_(divided)
    if group.frequency is not None:
        penalized.sub_(output_counts * group.frequency[part])
    if group.presence is not None:
        penalized.sub_(output_counts.clamp_(max=1.0).mul_(group.presence[part]))
