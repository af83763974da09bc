"""InputBatch: what every slot of this rank knows between steps, and the tensors that one step feeds to the model.

T tokens of a step, R requests (rows) of a step, B blocks of the longest sequence. Called by the model runner.
"""

from __future__ import annotations

import dataclasses
import operator

import msgspec
import numpy as np
import torch

from shoal.config.graph_sizes import OVERLAP_TOKENS
from shoal.messages import ScheduledBatch, SlotAssignment
from shoal.scheduling.block_pool import NULL_BLOCK

_INT = np.int64
# What a row of a decode step brings to the device, int32: see `kernels.step.unpack_rows`.
ROW_WIDTH = 8
SLOT_COLUMN = 0
# In a graph for many tokens a decode's context is not split: one of so many positions is read in about 0.3 ms a layer,
# a quarter of what it takes Python to launch a layer's kernels (estimated).
_LONGEST_DECODE = 1 << 14
_SLOT, _POSITION, _TOKEN, _SAMPLING, _UPDATE = SLOT_COLUMN, 1, 2, slice(3, 6), slice(6, 8)


@dataclasses.dataclass(slots=True)
class StepInputs:
    """One step, flattened. Host arrays are numpy, tensors are on the device.

    slots, starts, counts: per row, in the batch's order: slot, first position, number of tokens.
    row_of_token, host_positions: per token. positions [T], slot_mapping [T]: int64; slot_mapping is
    block * block_size + offset.
    block_tables [R, B]: int32. sample_rows: rows that sample; last_tokens [len(sample_rows)]: their last token's index.
    """

    step_id: int
    generation: int
    slots: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    row_of_token: np.ndarray
    host_positions: np.ndarray
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    sample_rows: np.ndarray
    last_tokens: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.row_of_token)

    @property
    def sample_slots(self) -> np.ndarray:
        """Slots of the rows that sample."""
        return self.slots[self.sample_rows]

    @property
    def seq_lens(self) -> list[int]:
        return (self.starts + self.counts).tolist()

    @property
    def query_lens(self) -> list[int]:
        return self.counts.tolist()


@dataclasses.dataclass(slots=True)
class DecodeRows:
    """A step of one token for each of its requests, all of which sample. packed [R, ROW_WIDTH]: what the device needs.

    slots, ends: per row; ends are the positions of the tokens to be sampled.
    """

    step_id: int
    generation: int
    slots: np.ndarray
    ends: np.ndarray
    packed: np.ndarray

    def put_sampling(self, parameters: np.ndarray) -> None:
        """parameters int32 [R, 3]: temperature, min_p, row key."""
        self.packed[:, _SAMPLING] = parameters


@dataclasses.dataclass(slots=True)
class TokenRows:
    """A step as rows for a graph, one for each of its T tokens. packed [T, ROW_WIDTH]: as in DecodeRows. sequences
    [4, n]: as `attention.sequences.plan_tiles` takes them, a request each, by slots.

    reading_slots: slots that read the token they sampled last. sample_slots, sample_ends: of the requests that sample,
    and the positions of their next tokens; last_rows [len(sample_slots)]: their last tokens' rows.
    """

    step_id: int
    generation: int
    reading_slots: np.ndarray
    sample_slots: np.ndarray
    sample_ends: np.ndarray
    last_rows: np.ndarray
    packed: np.ndarray
    sequences: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.packed)


def longest_first(batch: ScheduledBatch) -> ScheduledBatch:
    """The same step, its rows by context. Attention begins with the first ones: where short ones come last, all
    processors are done at about the same time. Every rank does so, with graphs or without, as rows of hidden states and
    tokens pass between them.

    A step that may be computed in halves stays as it is: a request may have found blocks in the prefix cache that
    another one of the same step writes, which the scheduler has put before it, and the first half does not see the
    second's.
    """
    if sum(item.num_new_tokens for item in batch.work) >= OVERLAP_TOKENS:
        return batch
    work = sorted(batch.work, key=operator.attrgetter("num_computed_tokens"), reverse=True)
    return msgspec.structs.replace(batch, work=work)


class InputBatch:
    """Per-slot state: ids that the host gave, the block table, and on the device the token sampled last.

    device_table: the block table once more, int32 [max_num_seqs + 1, B], where steps are captured in graphs: the slot
    behind the last is that of rows that pad a graph. Without it (None) there are no `decode_rows`.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        *,
        keeps_device_table: bool = False,
    ) -> None:
        self.block_size = block_size
        self.device = device
        max_blocks = -(-max_model_len // block_size)
        self.assignments: list[SlotAssignment | None] = [None] * max_num_seqs
        self._given_ids: list[np.ndarray] = [np.empty(0, _INT)] * max_num_seqs
        self._num_given = np.zeros(max_num_seqs, _INT)
        self._block_table = np.zeros((max_num_seqs, max_blocks), np.int32)
        self._num_blocks = np.zeros(max_num_seqs, _INT)
        self.padding_slot = max_num_seqs
        self.last_token = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self.device_table: torch.Tensor | None = None
        if keeps_device_table:
            self.device_table = torch.full((max_num_seqs + 1, max_blocks), NULL_BLOCK, dtype=torch.int32, device=device)

    def release(self, slot: int) -> None:
        self.assignments[slot] = None
        self._given_ids[slot] = np.empty(0, _INT)

    def assign(self, assignment: SlotAssignment) -> None:
        slot = assignment.slot
        self.assignments[slot] = assignment
        self._given_ids[slot] = np.asarray(assignment.token_ids, _INT)
        self._num_given[slot] = len(assignment.token_ids)
        self._num_blocks[slot] = 0
        self._block_table[slot] = NULL_BLOCK  # where a longer neighbour's padding reads

    def num_blocks(self, slot: int) -> int:
        """Blocks in a slot's table."""
        return int(self._num_blocks[slot])

    def prepare(self, batch: ScheduledBatch) -> StepInputs:
        """Take new blocks in and lay the step out. Costs a few microseconds a row, independent of context lengths."""
        self._upload_blocks(self._take_blocks(batch))
        slots = np.array([item.slot for item in batch.work], _INT)
        starts = np.array([item.num_computed_tokens for item in batch.work], _INT)
        counts = np.array([item.num_new_tokens for item in batch.work], _INT)
        sample_rows = np.flatnonzero(np.array([item.sample for item in batch.work]))

        ends = np.cumsum(counts)
        row_of_token = np.repeat(np.arange(len(slots)), counts)
        positions = np.arange(ends[-1]) - (ends - counts - starts)[row_of_token]
        slot_of_token = slots[row_of_token]
        blocks = self._block_table[slot_of_token, positions // self.block_size].astype(_INT)
        slot_mapping = blocks * self.block_size + positions % self.block_size
        max_blocks = int(-(-(starts + counts).max() // self.block_size))
        return StepInputs(
            step_id=batch.step_id,
            generation=batch.generation,
            slots=slots,
            starts=starts,
            counts=counts,
            row_of_token=row_of_token,
            host_positions=positions,
            positions=self._to_device(positions),
            slot_mapping=self._to_device(slot_mapping),
            block_tables=self._to_device(self._block_table[slots, :max_blocks]),
            sample_rows=sample_rows,
            last_tokens=self._to_device(ends[sample_rows] - 1),
        )

    def _take_blocks(self, batch: ScheduledBatch) -> list[tuple[int, int, list[int]]]:
        """Enter the step's new blocks: (slot, where they begin in its table, blocks) of those that have some."""
        taken = []
        for item in batch.work:
            if item.new_block_ids:
                slot, first = item.slot, int(self._num_blocks[item.slot])
                self._block_table[slot, first : first + len(item.new_block_ids)] = item.new_block_ids
                self._num_blocks[slot] = first + len(item.new_block_ids)
                taken.append((slot, first, item.new_block_ids))
        return taken

    def _upload_blocks(self, taken: list[tuple[int, int, list[int]]]) -> None:
        """Enter new blocks into the device's table, if there is one."""
        if self.device_table is None or not taken:
            return
        width = self._block_table.shape[1]
        index = [np.arange(len(blocks), dtype=_INT) + (slot * width + first) for slot, first, blocks in taken]
        flat = self._to_device(np.concatenate(index))
        blocks = self._to_device(np.concatenate([np.array(blocks, np.int32) for _, _, blocks in taken]))
        self.device_table.view(-1).index_copy_(0, flat, blocks)

    def decode_rows(self, batch: ScheduledBatch) -> DecodeRows | None:
        """The step as rows for a graph, its new blocks entered; None for a step that is more than one token each."""
        if self.device_table is None or not all(item.num_new_tokens == 1 and item.sample for item in batch.work):
            return None
        num_rows = len(batch.work)
        packed = np.empty((num_rows, ROW_WIDTH), np.int32)
        slots = np.fromiter((item.slot for item in batch.work), _INT, num_rows)
        starts = np.fromiter((item.num_computed_tokens for item in batch.work), _INT, num_rows)
        packed[:, _SLOT], packed[:, _POSITION], packed[:, _TOKEN], packed[:, _SAMPLING] = slots, starts, -1, 0
        for row in np.flatnonzero(starts < self._num_given[slots]):
            packed[row, _TOKEN] = self._given_ids[slots[row]][starts[row]]
        width = self._block_table.shape[1]
        packed[:, _UPDATE] = self.padding_slot * width, NULL_BLOCK
        taken = self._take_blocks(batch)
        if taken:
            row_of_slot = {int(slot): row for row, slot in enumerate(slots)}
            for slot, first, blocks in taken:
                if len(blocks) == 1:
                    packed[row_of_slot[slot], _UPDATE] = slot * width + first, blocks[0]
            self._upload_blocks([each for each in taken if len(each[2]) > 1])
        return DecodeRows(batch.step_id, batch.generation, slots, starts + 1, packed)

    def token_rows(self, batch: ScheduledBatch, most_tokens: int) -> TokenRows | None:
        """The step as a row a token, its new blocks entered. None where there is no table on the device, or for a step
        of more tokens, or one with a decode that sees more than _LONGEST_DECODE."""
        num_tokens = sum(item.num_new_tokens for item in batch.work)
        if self.device_table is None or num_tokens > most_tokens:
            return None
        counts = np.array([item.num_new_tokens for item in batch.work], _INT)
        starts = np.array([item.num_computed_tokens for item in batch.work], _INT)
        if (starts[counts == 1] >= _LONGEST_DECODE).any():
            return None
        ends = np.cumsum(counts)
        row_of_token = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(num_tokens) - (ends - counts - starts)[row_of_token]
        slots = np.array([item.slot for item in batch.work], _INT)
        packed = self.padding_rows(num_tokens)
        packed[:, _SLOT], packed[:, _POSITION] = slots[row_of_token], positions
        for row in np.flatnonzero(starts < self._num_given[slots]):
            given = self._given_ids[slots[row]][starts[row] : starts[row] + counts[row]]
            first = ends[row] - counts[row]
            packed[first : first + len(given), _TOKEN] = given
        self._upload_blocks(self._take_blocks(batch))
        samples = np.flatnonzero(np.array([item.sample for item in batch.work]))
        return TokenRows(
            step_id=batch.step_id,
            generation=batch.generation,
            reading_slots=slots[starts + counts > self._num_given[slots]],
            sample_slots=slots[samples],
            sample_ends=(starts + counts)[samples],
            last_rows=ends[samples] - 1,
            packed=packed,
            sequences=np.stack([slots, ends - counts, counts, starts + counts]),
        )

    def padding_rows(self, count: int) -> np.ndarray:
        """Rows [count, ROW_WIDTH] that write to the null block and store their token where nobody reads it."""
        row = [self.padding_slot, 0, -1, 0, 0, 0, self.padding_slot * self._block_table.shape[1], NULL_BLOCK]
        return np.tile(np.array(row, np.int32), (count, 1))

    def reading_slots(self, inputs: StepInputs) -> np.ndarray:
        """Slots whose last token of this step is the one that they sampled last."""
        return inputs.slots[inputs.starts + inputs.counts > self._num_given[inputs.slots]]

    def token_ids(self, inputs: StepInputs) -> torch.Tensor:
        """Ids of the step's tokens, int64 [T]: those given by the host, else the one that the slot sampled last. What
        the slots of `reading_slots` sampled must be stored before."""
        slots, starts, counts = inputs.slots, inputs.starts, inputs.counts
        slot_of_token = slots[inputs.row_of_token]
        on_device = inputs.host_positions >= self._num_given[slot_of_token]
        if on_device.all():
            return self.last_token.index_select(0, self._to_device(slots))
        host_ids = np.zeros(inputs.num_tokens, _INT)
        ends = np.cumsum(counts)
        for row in np.flatnonzero(starts < self._num_given[slots]):
            first, count, end = starts[row], counts[row], ends[row]
            host_ids[end - count : end] = self._given_ids[slots[row]][first : first + count]
        token_ids = self._to_device(host_ids)
        if on_device.any():
            sampled = self.last_token.index_select(0, self._to_device(slot_of_token))
            token_ids = torch.where(self._to_device(on_device), sampled, token_ids)
        return token_ids

    def store_sampled(self, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Keep what these slots sampled for their next step, on the device: both int64 [R]."""
        self.last_token.index_copy_(0, slots, token_ids)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)
