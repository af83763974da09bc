"""Deterministic attention on CUDA: a query row has the same bits in any batch, chunking, prefix hit, padding or split
of heads over ranks. The registry makes it for deterministic mode where the kernels run; fixed_attention computes.

S sequences, T tokens, B blocks, Hq query heads, Hk KV heads, G = Hq / Hk, D head size, N blocks of the cache.
"""

from __future__ import annotations

import dataclasses

import torch

from shoal.attention.base import AttentionBackend, AttentionMetadata, DeviceRows, HeadTransform
from shoal.kernels.fixed_attention import decode_scratch_bytes, fixed_decode, fixed_prefill, query_tile_tokens
from shoal.kernels.heads import transform_and_write


@dataclasses.dataclass(slots=True)
class _Plan:
    """Sequences with one new token, and prompts' pieces of several: (row of the table, first token, first position,
    new tokens), cut into query tiles of a number of tokens."""

    decodes: DeviceRows | None
    decode_tokens: torch.Tensor | None
    pieces: list[tuple[int, int, int, int]]
    tiles: dict[int, torch.Tensor]


class DeterministicCudaAttention(AttentionBackend):
    """Cache: [2, Hk, N, block_size, D], keys then values."""

    name = "deterministic_cuda"
    reads_past_end = False
    follows_device = True
    transforms_heads = True

    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return (2, num_kv_heads, num_blocks, block_size, head_dim)

    def clear_blocks(self, kv_cache: torch.Tensor, blocks: torch.Tensor) -> None:
        kv_cache.index_fill_(2, blocks, 0)

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_dim: int, max_model_len: int) -> int:
        return decode_scratch_bytes(num_heads, num_kv_heads, head_dim, max_model_len)

    def prepare(self, metadata: AttentionMetadata) -> None:
        if metadata.device_rows is not None:
            metadata.plan = _Plan(metadata.device_rows, None, [], {})
            return
        decodes: list[tuple[int, int, int]] = []  # row of the table, length, token
        pieces, first_token = [], 0
        for row, (num_new, seq_len) in enumerate(zip(metadata.query_lens, metadata.seq_lens, strict=True)):
            if num_new == 1:
                decodes.append((row, seq_len, first_token))
            else:
                pieces.append((row, first_token, seq_len - num_new, num_new))
            first_token += num_new
        if not decodes:
            metadata.plan = _Plan(None, None, pieces, {})
            return
        rows, lengths, tokens = _upload(decodes, metadata.block_tables.device).t().contiguous().unbind(0)
        metadata.plan = _Plan(DeviceRows(rows, lengths), tokens, pieces, {})

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
        transform_and_write(query, key, value, kv_cache, metadata.slot_mapping)
        return _attend(query, kv_cache, metadata, scale, sliding_window)

    def forward_projected(
        self,
        projected: torch.Tensor,
        positions: torch.Tensor,
        transform: HeadTransform,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        num_heads: int,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        num_kv_heads, head_dim = kv_cache.shape[1], kv_cache.shape[4]
        heads = projected.view(projected.shape[0], num_heads + 2 * num_kv_heads, head_dim)
        query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        query, _ = transform_and_write(
            query,
            key,
            value,
            kv_cache,
            metadata.slot_mapping,
            positions=positions,
            table=transform.table,
            query_norm=transform.query_norm,
            key_norm=transform.key_norm,
            eps=transform.eps,
        )
        return _attend(query, kv_cache, metadata, scale, sliding_window)


def _attend(
    query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata, scale: float, window: int | None
) -> torch.Tensor:
    """query [T, Hq, D] -> [T, Hq * D]."""
    num_tokens, num_heads, head_dim = query.shape
    output = torch.empty(num_tokens, num_heads * head_dim, dtype=query.dtype, device=query.device)
    plan: _Plan = metadata.plan
    if plan.decodes is not None:
        fixed_decode(
            query,
            kv_cache,
            output,
            metadata.block_tables,
            plan.decodes.table_rows,
            plan.decodes.seq_lens,
            plan.decode_tokens,
            scale=scale,
            sliding_window=window,
        )
    if plan.pieces:
        tiles = _query_tiles(plan, query, num_heads // kv_cache.shape[1])
        fixed_prefill(query, kv_cache, output, metadata.block_tables, tiles, scale=scale, sliding_window=window)
    return output


def _query_tiles(plan: _Plan, query: torch.Tensor, group: int) -> torch.Tensor:
    """[I, 4], longest contexts first: they take the most time."""
    step = query_tile_tokens(group, query.dtype, query.shape[2])
    if step not in plan.tiles:
        tiles = [
            (row, first_token + start, position + start, min(step, num_new - start))
            for row, first_token, position, num_new in plan.pieces
            for start in range(0, num_new, step)
        ]
        tiles.sort(key=lambda tile: -tile[2])
        plan.tiles[step] = _upload(tiles, query.device)
    return plan.tiles[step]


def _upload(
    numbers: list[tuple[int, int, int]] | list[tuple[int, int, int, int]], device: torch.device
) -> torch.Tensor:
    """int32, without waiting for the device: from pageable memory a copy would wait for all steps that are queued."""
    on_gpu = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=on_gpu).to(device, non_blocking=True)
