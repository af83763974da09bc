"""The first kernel of a captured step: from one packed upload to what the layers and the sampler read. For the worker.

R rows of the graph, B blocks in a row of the block table.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 128


@triton.jit
def _unpack_kernel(
    packed, last_token, block_table, token_ids, positions, slots, table_rows, seq_lens, slot_mapping, temperatures,
    min_ps, row_keys, num_rows, num_columns, block_size, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * block + tl.arange(0, block)
    inside = row < num_rows
    base = packed + row * 8
    slot = tl.load(base, mask=inside, other=0)
    position = tl.load(base + 1, mask=inside, other=0)
    given = tl.load(base + 2, mask=inside, other=0)
    update_index = tl.load(base + 6, mask=inside, other=0)
    update_block = tl.load(base + 7, mask=inside, other=0)
    tl.store(block_table + update_index, update_block, mask=inside)
    sampled = tl.load(last_token + slot, mask=inside, other=0)
    tl.store(token_ids + row, tl.where(given >= 0, given.to(tl.int64), sampled), mask=inside)
    tl.store(positions + row, position.to(tl.int64), mask=inside)
    tl.store(slots + row, slot.to(tl.int64), mask=inside)
    tl.store(table_rows + row, slot, mask=inside)
    tl.store(seq_lens + row, position + 1, mask=inside)
    # A row's update is of its own slot: what other rows write is not read here.
    index = slot * num_columns + position // block_size
    known = tl.load(block_table + index, mask=inside, other=0)
    found = tl.where(index == update_index, update_block, known)
    tl.store(slot_mapping + row, found.to(tl.int64) * block_size + position % block_size, mask=inside)
    tl.store(temperatures + row, tl.load(base + 3, mask=inside, other=0).to(tl.float32, bitcast=True), mask=inside)
    tl.store(min_ps + row, tl.load(base + 4, mask=inside, other=0).to(tl.float32, bitcast=True), mask=inside)
    tl.store(row_keys + row, tl.load(base + 5, mask=inside, other=0), mask=inside)


def unpack_rows(
    packed: torch.Tensor,
    last_token: torch.Tensor,
    block_table: torch.Tensor,
    outputs: dict[str, torch.Tensor],
    block_size: int,
) -> None:
    """packed int32 [R, 8]: slot, position, token id (-1: the slot's last_token), temperature and min_p as bits of fp32,
    sampling key, index in the flat block table of a new block of this row's slot, and that block.

    last_token int64 [slots]; block_table int32 [slots, B], updated. outputs, all [R]: token_ids, positions, slots,
    slot_mapping int64; table_rows, seq_lens, row_keys int32; temperatures, min_ps fp32.
    """
    num_rows = packed.shape[0]
    _unpack_kernel[(triton.cdiv(num_rows, _BLOCK),)](
        packed, last_token, block_table, outputs["token_ids"], outputs["positions"], outputs["slots"],
        outputs["table_rows"], outputs["seq_lens"], outputs["slot_mapping"], outputs["temperatures"],
        outputs["min_ps"], outputs["row_keys"], num_rows, block_table.shape[1], block_size, block=_BLOCK,
    )  # fmt: skip
