"""SamplingState: the sampling parameters of all running requests, by slot. Owned and called by the model runner.

A step: `prepare` (host work of some microseconds) → Sampler.sample → `commit`. None of them waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.distributed.group import GroupCoordinator
from shoal.distributed.vocabulary import VocabularySlice
from shoal.sampling.device_rows import SimpleRows
from shoal.sampling.ordering import MAX_VOCAB_SIZE
from shoal.sampling.penalties import PenaltyCounts
from shoal.sampling.plan import SamplingPlan, build_plan
from shoal.sampling.random import row_keys
from shoal.sampling.rows import take_rows, upload
from shoal.sampling.slots import FREE, NO_PENALTIES, SlotTable
from shoal.types.sampling_params import SamplingParams

# Pipeline parallelism takes turns between batches; a plan is small.
_MAX_PLANS = 16


@dataclass(frozen=True, slots=True)
class SamplingMetadata:
    """What one step needs. row_keys: int32 [number of rows that draw]; suppressed: flat index of the end tokens that
    min_tokens forbids at these positions; counts: what penalties read."""

    plan: SamplingPlan
    row_keys: Tensor | None
    suppressed: Tensor | None
    counts: PenaltyCounts


class _PlanEntry:
    """A plan, and the last upload of what min_tokens suppresses: it changes only when a row passes its minimum."""

    def __init__(self, plan: SamplingPlan) -> None:
        self.plan = plan
        self._key = b""
        self._suppressed: Tensor | None = None

    def suppressed(self, positions: list[int]) -> Tensor | None:
        rows = self.plan.minimum_rows
        if not rows.size:
            return None
        below = np.array(positions, dtype=np.int64)[rows] < self.plan.first_free_positions
        key = below.tobytes()
        if key != self._key:
            self._key = key
            self._suppressed = self.plan.suppressed(below)
        return self._suppressed


class SamplingState:
    """Parameters and penalty counts of the requests in slots 0 … max_num_seqs - 1.

    group: the ranks that share the vocabulary, which sample together: all of them hold this state, and take the same
    steps. None: this rank has all of it.
    """

    def __init__(
        self, max_num_seqs: int, vocab_size: int, device: torch.device, group: GroupCoordinator | None = None
    ) -> None:
        assert vocab_size <= MAX_VOCAB_SIZE, f"a vocabulary of {vocab_size} tokens does not fit the ordering keys"
        self._device = torch.device(device)
        vocabulary = VocabularySlice(vocab_size, group)
        self._table = SlotTable(max_num_seqs, vocabulary, self._device)
        self._counts = PenaltyCounts(vocabulary, self._device)
        self._plans: dict[tuple[int, ...], _PlanEntry] = {}
        self._simple: dict[tuple[int, ...], SimpleRows | None] = {}

    def assign(self, slot: int, params: SamplingParams, token_ids: list[int], num_prompt_tokens: int) -> None:
        """A new or resumed request enters a free slot. token_ids: prompt, then the output known so far."""
        assert self._table.kind[slot] == FREE, f"slot {slot} is taken"
        penalty_row = NO_PENALTIES
        if params.uses_penalties:
            penalty_row = self._counts.acquire(token_ids[:num_prompt_tokens], token_ids[num_prompt_tokens:])
        self._table.fill(slot, params, num_prompt_tokens, penalty_row)

    def release(self, slot: int) -> None:
        """The slot's request is gone."""
        assert self._table.kind[slot] != FREE, f"slot {slot} is free already"
        if self._table.penalty_row[slot] != NO_PENALTIES:
            self._counts.release(int(self._table.penalty_row[slot]))
        self._table.clear(slot)
        self._plans = {slots: plan for slots, plan in self._plans.items() if slot not in slots}
        self._simple = {slots: rows for slots, rows in self._simple.items() if slot not in slots}

    def prepare(self, slots: list[int], positions: list[int]) -> SamplingMetadata:
        """Row i of the step samples the token at index positions[i] of the sequence in slots[i]."""
        key = tuple(slots)
        entry = self._plans.get(key)
        if entry is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.pop(next(iter(self._plans)))
            entry = self._plans[key] = _PlanEntry(build_plan(self._table, np.array(slots, dtype=np.int64)))
        plan = entry.plan
        keys = None
        if plan.draw_rows.size:
            draw_positions = np.array(positions, dtype=np.uint64)[plan.draw_rows]
            keys = upload(row_keys(plan.mixed_seeds, draw_positions), self._device)
        return SamplingMetadata(plan, keys, entry.suppressed(positions), self._counts)

    def simple_rows(self, slots: list[int], positions: list[int]) -> npt.NDArray[np.int32] | None:
        """For a captured step, in place of `prepare`: int32 [R, 3], as `SimpleRows.at` has them; None where a row asks
        for more than that."""
        key = tuple(slots)
        if key not in self._simple:
            if len(self._simple) >= _MAX_PLANS:
                self._simple.pop(next(iter(self._simple)))
            self._simple[key] = SimpleRows.of(self._table, np.array(slots, dtype=np.int64))
        rows = self._simple[key]
        return None if rows is None else rows.at(positions)

    def commit(self, metadata: SamplingMetadata, token_ids: Tensor) -> None:
        """Count the sampled token_ids, int64 [R], for penalties: after sampling, in stream order, nothing read back."""
        group = metadata.plan.penalties
        if group is not None:
            self._counts.add(group.pool_rows, take_rows(token_ids, group.rows))
