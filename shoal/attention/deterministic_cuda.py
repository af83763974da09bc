"""Deterministic attention on CUDA: a query row has the same bits in any batch, chunking, prefix hit, padding or split
of heads over ranks. The registry makes it for deterministic mode where the kernels run; fixed_attention computes.

S sequences, T tokens, B blocks, Hq query heads, Hk KV heads, G = Hq / Hk, D head size, N blocks of the cache.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from shoal.attention.base import AttentionBackend, AttentionForm, AttentionMetadata, DeviceRows, HeadTransform
from shoal.attention.cache_dtype import clear_blocks
from shoal.kernels.fixed_attention import decode_scratch_bytes, fixed_decode, fixed_prefill, query_tile_tokens
from shoal.kernels.heads import transform_and_write
from shoal.kernels.latent_attention import (
    latent_decode,
    latent_prefill,
    latent_scratch_bytes,
    latent_tile_tokens,
    write_latents,
)
from shoal.kernels.prefill_attention import plan_tiles


@dataclasses.dataclass(slots=True)
class _Plan:
    """Sequences with one new token, and prompts' pieces of several: (row of the table, first token, first position,
    new tokens), cut into query tiles of a number of tokens."""

    decodes: DeviceRows | None
    decode_tokens: torch.Tensor | None
    pieces: list[tuple[int, int, int, int]]
    tiles: dict[int, torch.Tensor]
    latent_tiles: torch.Tensor | None = None  # as `plan_tiles` makes them


class DeterministicCudaAttention(AttentionBackend):
    """Cache: [2, Hk, N, block_size, D], keys then values."""

    name = "deterministic_cuda"
    reads_past_end = False
    follows_device = True
    transforms_heads = True

    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return (2, num_kv_heads, num_blocks, block_size, head_dim)

    def clear_blocks(self, kv_cache: torch.Tensor, blocks: torch.Tensor) -> None:
        clear_blocks(kv_cache, blocks)

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
        form: AttentionForm,
    ) -> torch.Tensor:
        transform_and_write(
            query,
            key,
            value,
            kv_cache,
            metadata.slot_mapping,
            key_scale=form.key_scale,
            value_scale=form.value_scale,
        )
        return _attend(query, kv_cache, metadata, form)

    def forward_projected(
        self,
        projected: torch.Tensor,
        positions: torch.Tensor,
        transform: HeadTransform,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        form: AttentionForm,
        *,
        num_heads: int,
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
            interleaved=transform.interleaved,
            key_scale=form.key_scale,
            value_scale=form.value_scale,
        )
        return _attend(query, kv_cache, metadata, form)

    def latent_scratch_bytes(self, num_heads: int, latent_dim: int, max_model_len: int) -> int:
        return latent_scratch_bytes(num_heads, latent_dim, max_model_len)

    def forward_latent(
        self,
        query: torch.Tensor,
        latent: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        value_dim: int,
        cache_scale: float = 1.0,
    ) -> torch.Tensor:
        plan: _Plan = metadata.plan
        write_latents(latent, kv_cache, metadata.slot_mapping, cache_scale=cache_scale)
        output = query.new_empty((*query.shape[:2], value_dim))
        tables, scales = metadata.block_tables, {"scale": scale, "cache_scale": cache_scale}
        if (rows := plan.decodes) is not None:
            latent_decode(
                query, kv_cache, output, tables, rows.table_rows, rows.seq_lens, plan.decode_tokens, None, **scales
            )
        if plan.pieces:
            if plan.latent_tiles is None:
                pieces = np.array([(row, token, count, first + count) for row, token, first, count in plan.pieces]).T
                tile_tokens = latent_tile_tokens(query.shape[1], query.dtype, query.device, fixed=True)
                plan.latent_tiles = _upload(plan_tiles(pieces, tile_tokens).tolist(), query.device)
            latent_prefill(query, kv_cache, output, tables, plan.latent_tiles, fixed=True, **scales)
        return output


def _attend(
    query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata, form: AttentionForm
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
            **form.arguments(),
        )
    if plan.pieces:
        tiles = _query_tiles(plan, query, num_heads // kv_cache.shape[1])
        fixed_prefill(query, kv_cache, output, metadata.block_tables, tiles, **form.arguments())
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
