"""Attention written out plainly, one sequence and one position list at a time: what the fast backends are tested by.

Hq query heads, Hk KV heads, G = Hq / Hk, D head size, Q new tokens and C context tokens of one sequence.
"""

from __future__ import annotations

import torch

from shoal.attention.base import AttentionBackend, AttentionMetadata


class ReferenceAttention(AttentionBackend):
    """Slow and obviously right. Computes in float64. Cache: [2, num_blocks, block_size, Hk, D], keys then values."""

    name = "reference"
    reads_past_end = False
    follows_device = True

    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return (2, num_blocks, block_size, num_kv_heads, head_dim)

    def clear_blocks(self, kv_cache: torch.Tensor, blocks: torch.Tensor) -> None:
        kv_cache.index_fill_(1, blocks, 0)

    def prepare(self, metadata: AttentionMetadata) -> None:
        rows = metadata.device_rows
        if rows is not None:  # by looking at them: nothing for a graph
            metadata.seq_lens = rows.seq_lens.tolist()
            metadata.query_lens = [1] * len(metadata.seq_lens)
            metadata.block_tables = metadata.block_tables[rows.table_rows.long()]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        keys, values = kv_cache[0].flatten(0, 1), kv_cache[1].flatten(0, 1)  # [slots, Hk, D]
        keys[metadata.slot_mapping] = key
        values[metadata.slot_mapping] = value
        outputs, start = [], 0
        for row, (num_new, context) in enumerate(zip(metadata.query_lens, metadata.seq_lens, strict=True)):
            positions = torch.arange(context, device=query.device)
            blocks = metadata.block_tables[row].long()[positions // metadata.block_size]
            slots = blocks * metadata.block_size + positions % metadata.block_size
            new_query = query[start : start + num_new]
            outputs.append(_attend(new_query, keys[slots], values[slots], scale, sliding_window))
            start += num_new
        return torch.cat(outputs).to(query.dtype)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, sliding_window: int | None
) -> torch.Tensor:
    """query [Q, Hq, D] are the last Q positions of keys and values [C, Hk, D]; returns [Q, Hq * D] in float64."""
    num_new, num_heads, _ = query.shape
    context, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    keys = keys.double().repeat_interleave(group, dim=1)
    values = values.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,chd->hqc", query.double(), keys) * scale
    query_position = torch.arange(context - num_new, context, device=query.device)[:, None]
    key_position = torch.arange(context, device=query.device)[None, :]
    visible = key_position <= query_position
    if sliding_window is not None:
        visible &= key_position > query_position - sliding_window
    weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
    return torch.einsum("hqc,chd->qhd", weights, values).flatten(1)
