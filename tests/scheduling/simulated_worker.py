"""A worker without tensors: it checks that every step it is given makes sense, and samples by a rule.

The token at a position is a pure function of the ids before it, so the right output of a request is known
whatever the batching, chunking, preemption and prefix hits were. It keeps a simulated KV cache: each cell remembers
the whole history that it was computed from, and a read of a cell with another history fails. With several stages it
also checks that no step reads a token that the pipeline does not have yet at its first stage.
"""

from __future__ import annotations

import zlib
from array import array

from shoal.messages import BatchResult, ScheduledBatch, SlotAssignment, SlotResult, TokenLogprobs

VOCAB_SIZE = 50


def next_token(history: list[int]) -> int:
    return zlib.crc32(array("q", history).tobytes()) % VOCAB_SIZE


class _Slot:
    def __init__(self, assignment: SlotAssignment) -> None:
        self.assignment = assignment
        self.token_ids = list(assignment.token_ids)
        self.block_ids: list[int] = []
        self.sampled_in: list[int] = []  # steps


class SimulatedWorker:
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_stages: int = 1,
        before_known: bool = True,
    ) -> None:
        self.num_stages = num_stages
        self.before_known = before_known
        self.last_known_step = -1  # of those whose results the scheduler has
        self.num_early_steps = 0
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.cells: dict[tuple[int, int], int] = {}
        self.num_blocks = num_blocks
        self.slots: dict[int, _Slot] = {}

    def run(self, batch: ScheduledBatch) -> BatchResult:
        for slot in batch.released_slots:
            self.slots.pop(slot)
        for assignment in batch.assigned:
            assert assignment.slot not in self.slots, "slot assigned twice"
            assert 0 <= assignment.slot < self.max_num_seqs
            self.slots[assignment.slot] = _Slot(assignment)
        assert 0 < batch.num_tokens <= self.max_num_batched_tokens
        assert len({item.slot for item in batch.work}) == len(batch.work)
        self._check_tokens_have_come(batch)
        self._write(batch)
        return BatchResult(batch.step_id, batch.generation, self._sample(batch))

    def _check_tokens_have_come(self, batch: ScheduledBatch) -> None:
        """A token that is read must be known to the host, or have been sampled a whole round of the pipeline ago. Or
        the first stage waits for it, because all that the step holds comes out of one step in flight."""
        awaited: set[int] = set()
        for item in batch.work:
            slot = self.slots[item.slot]
            reads_sampled = item.num_computed_tokens + item.num_new_tokens > len(slot.assignment.token_ids)
            unknown = [step for step in slot.sampled_in if step > self.last_known_step] if reads_sampled else []
            assert self.before_known or not unknown, "the host does not know the token yet"
            if unknown and batch.step_id < unknown[-1] + self.num_stages:
                assert len(unknown) == 1, "the step before has not even begun"
                awaited.add(unknown[-1])
        if awaited:
            self.num_early_steps += 1
            assert len(awaited) == 1
            assert all(self.slots[item.slot].sampled_in[-1:] == list(awaited) for item in batch.work), (
                "it stalls others"
            )

    def _history(self, slot: _Slot, position: int) -> int:
        return zlib.crc32(array("q", slot.token_ids[: position + 1]).tobytes())

    def _cell(self, slot: _Slot, position: int) -> tuple[int, int]:
        return slot.block_ids[position // self.block_size], position % self.block_size

    def _write(self, batch: ScheduledBatch) -> None:
        written: set[tuple[int, int]] = set()
        for item in batch.work:
            slot = self.slots[item.slot]
            slot.block_ids += item.new_block_ids
            assert all(0 < block < self.num_blocks for block in item.new_block_ids)
            end = item.num_computed_tokens + item.num_new_tokens
            assert item.num_new_tokens > 0 and end <= len(slot.token_ids)
            assert item.sample == (end == len(slot.token_ids))
            for position in range(item.num_computed_tokens, end):
                cell = self._cell(slot, position)
                assert cell not in written, "two requests write one cell in one step"
                written.add(cell)
                self.cells[cell] = self._history(slot, position)

    def _sample(self, batch: ScheduledBatch) -> list[SlotResult]:
        results = []
        for item in batch.work:
            slot = self.slots[item.slot]
            end = item.num_computed_tokens + item.num_new_tokens
            for position in range(end):
                assert self.cells.get(self._cell(slot, position)) == self._history(slot, position), "stale KV"
            prompt_logprobs = None
            if slot.assignment.sampling.prompt_logprobs is not None:
                stop = min(end, slot.assignment.num_prompt_tokens - 1)
                prompt_logprobs = [
                    TokenLogprobs([slot.token_ids[position + 1]], [0.0], 1)
                    for position in range(item.num_computed_tokens, stop)
                ]
            token_ids = []
            if item.sample:
                token_ids = [next_token(slot.token_ids)]
                slot.token_ids += token_ids
                slot.sampled_in.append(batch.step_id)
            if token_ids or prompt_logprobs:
                results.append(SlotResult(item.slot, token_ids, None, prompt_logprobs))
        return results
