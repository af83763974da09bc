"""Deterministic attention on CUDA: a query row has the same bits in any batch, chunking, prefix hit, padding or split
of heads over ranks. The registry makes it for deterministic mode where the kernels run; fixed_attention computes.

S sequences, T tokens, B blocks, Hq query heads, Hk KV heads, G = Hq / Hk, D head size, N blocks of the cache.
"""

from __future__ import annotations

import torch

from shoal.attention.base import AttentionBackend, AttentionForm, AttentionMetadata, HeadTransform
from shoal.attention.cache_dtype import clear_blocks
from shoal.attention.step_plan import StepPlan
from shoal.kernels.fixed_attention import decode_scratch_bytes, fixed_decode, fixed_prefill, query_tile_tokens
from shoal.kernels.heads import transform_and_write
from shoal.kernels.latent_attention import (
    latent_decode,
    latent_prefill,
    latent_scratch_bytes,
    latent_tile_tokens,
    write_latents,
)


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
        metadata.plan = StepPlan.of(metadata)

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
        plan: StepPlan = metadata.plan
        write_latents(latent, kv_cache, metadata.slot_mapping, cache_scale=cache_scale)
        output = plan.new_output(query, (*query.shape[:2], value_dim))
        tables, scales = metadata.block_tables, {"scale": scale, "cache_scale": cache_scale}
        if (rows := plan.decodes) is not None:
            latent_decode(query, kv_cache, output, tables, rows.table_rows, rows.seq_lens, rows.tokens, None, **scales)
        if plan.has_prompts:
            tiles = plan.tiles(latent_tile_tokens(query.shape[1], query.dtype, query.device, fixed=True), query)
            latent_prefill(query, kv_cache, output, tables, tiles, fixed=True, **scales)
        return output


def _attend(
    query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata, form: AttentionForm
) -> torch.Tensor:
    """query [T, Hq, D] -> [T, Hq * D]."""
    num_tokens, num_heads, head_dim = query.shape
    plan: StepPlan = metadata.plan
    output = plan.new_output(query, (num_tokens, num_heads * head_dim))
    if plan.decodes is not None:
        fixed_decode(
            query,
            kv_cache,
            output,
            metadata.block_tables,
            plan.decodes.table_rows,
            plan.decodes.seq_lens,
            plan.decodes.tokens,
            **form.arguments(),
        )
    if plan.has_prompts:
        tiles = plan.tiles(query_tile_tokens(num_heads // kv_cache.shape[1], query.dtype, head_dim), query)
        fixed_prefill(query, kv_cache, output, metadata.block_tables, tiles, **form.arguments())
    return output
