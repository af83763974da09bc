"""Paged attention with Triton kernels, for NVIDIA GPUs: a step of one token a sequence is one kernel from the
projection on, in CUDA graphs too; prompts go together in one launch. Registered as "triton_paged".

S sequences, T tokens, Hq query heads, Hk KV heads, D head size, N blocks of the cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from shoal.attention.base import AttentionBackend, AttentionForm, AttentionMetadata, HeadTransform
from shoal.attention.cache_dtype import clear_blocks
from shoal.attention.fresh_prompts import FreshPrompts
from shoal.attention.step_plan import StepPlan
from shoal.kernels.decode_attention import DecodeWorkspace, decode_attention
from shoal.kernels.heads import transform_and_write
from shoal.kernels.latent_attention import (
    LatentWorkspace,
    latent_decode,
    latent_prefill,
    latent_tile_tokens,
    write_latents,
)
from shoal.kernels.prefill_attention import prefill_attention, tile_rows


@dataclasses.dataclass(slots=True)
class _Plan(StepPlan):
    # Whether a layer of this step has attended: from then on lengths, tables and caches are known to be in place while
    # the kernel in front of an attention kernel still runs.
    has_begun: bool = False


class TritonPagedAttention(AttentionBackend):
    """Cache: [2, Hk, N, block_size, D], keys then values."""

    name = "triton_paged"
    reads_past_end = False
    follows_device = True
    transforms_heads = True

    def __init__(self) -> None:
        self._workspace: DecodeWorkspace | None = None
        self._latent_workspace: LatentWorkspace | None = None
        self._fresh: FreshPrompts | None = None

    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return (2, num_kv_heads, num_blocks, block_size, head_dim)

    def clear_blocks(self, kv_cache: torch.Tensor, blocks: torch.Tensor) -> None:
        clear_blocks(kv_cache, blocks)

    def prepare(self, metadata: AttentionMetadata) -> None:
        device = metadata.block_tables.device
        if self._workspace is None:
            self._workspace, self._fresh = DecodeWorkspace(device), FreshPrompts(device)
            self._latent_workspace = LatentWorkspace(device)
        metadata.plan = _Plan.of(metadata)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        form: AttentionForm,
    ) -> torch.Tensor:
        return self._forward(query, key, value, kv_cache, metadata, form, {})

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
        how = {
            "positions": positions,
            "table": transform.table,
            "query_norm": transform.query_norm,
            "key_norm": transform.key_norm,
            "eps": transform.eps,
            "interleaved": transform.interleaved,
        }
        return self._forward(query, key, value, kv_cache, metadata, form, how)

    def _forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        form: AttentionForm,
        transform: dict[str, Any],
    ) -> torch.Tensor:
        plan: _Plan = metadata.plan
        num_tokens, num_heads, head_dim = query.shape
        output = plan.new_output(query, (num_tokens, num_heads * head_dim))
        if plan.has_prompts:
            self._prefill(query, key, value, kv_cache, output, metadata, form, transform)
        if plan.decodes is not None:
            assert self._workspace is not None
            early = plan.has_begun and not plan.has_prompts and not metadata.goes_on
            decode_attention(
                query, key, value, kv_cache, output, plan.decodes, self._workspace,
                early=early, **form.arguments(), **transform,
            )  # fmt: skip
            plan.has_begun = True
        return output

    def _prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        metadata: AttentionMetadata,
        form: AttentionForm,
        transform: dict[str, Any],
    ) -> None:
        """All new keys and values go to the cache, whoever attends; then the pieces of prompts."""
        plan: _Plan = metadata.plan
        assert self._fresh is not None
        num_heads, head_dim = query.shape[1:]
        fresh = self._fresh.takes(plan.prompts[2], plan.prompts[3], query.dtype, head_dim, form)
        ready, keys = transform_and_write(
            query, key, value, kv_cache, metadata.slot_mapping,
            key_scale=form.key_scale, value_scale=form.value_scale, keep_keys=bool(fresh.any()), **transform,
        )  # fmt: skip
        rows = output.view(-1, num_heads, head_dim)
        for index in np.flatnonzero(fresh):
            start, count = plan.prompts[1:3, index].tolist()
            own = slice(start, start + count)
            fresh[index] = self._fresh.attend(ready[own], keys[own], value[own], rows[own], form.scale)
        if fresh.size and fresh.all():
            return
        group = num_heads // key.shape[1]
        tiles = plan.tiles(tile_rows(group, head_dim, query.dtype, query.device) // group, query, fresh)
        prefill_attention(ready, kv_cache, output, metadata.block_tables, tiles, **form.arguments())

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
        output = plan.new_output(query, (*query.shape[:2], value_dim))
        scales = {"scale": scale, "cache_scale": cache_scale}
        if plan.has_prompts:
            tile_tokens = latent_tile_tokens(query.shape[1], query.dtype, query.device, fixed=False)
            tiles = plan.tiles(tile_tokens, query)
            latent_prefill(query, kv_cache, output, metadata.block_tables, tiles, fixed=False, **scales)
        if (rows := plan.decodes) is not None:
            latent_decode(
                query, kv_cache, output, rows.block_tables, rows.table_rows, rows.seq_lens, rows.tokens,
                self._latent_workspace, **scales,
            )  # fmt: skip
        return output
