"""The attention of one layer: what happens to its heads before, its scale, its window. The backend does the work."""

from __future__ import annotations

import torch
from torch import nn

from shoal.attention.base import AttentionMetadata, HeadTransform
from shoal.layers.context import BuildContext
from shoal.layers.norm import RMSNorm
from shoal.layers.rotary import Angles, RotaryEmbedding


class Attention(nn.Module):
    """Hq query heads, Hk KV heads of this rank, D head size, T tokens. Heads enter as they are."""

    def __init__(self, context: BuildContext, head_dim: int, sliding_window: int | None) -> None:
        super().__init__()
        self.backend = context.attention_backend
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.sliding_window = sliding_window

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """query [T, Hq, D], key and value [T, Hk, D] -> [T, Hq * D]."""
        return self.backend.forward(
            query, key, value, kv_cache, metadata, scale=self.scale, sliding_window=self.sliding_window
        )


class RotaryAttention(Attention):
    """Attention of heads that turn with their position, and are normalised before where the model has norms for it."""

    def __init__(
        self,
        context: BuildContext,
        head_dim: int,
        sliding_window: int | None,
        *,
        num_heads: int,
        num_kv_heads: int,
        rotary: RotaryEmbedding,
        query_norm: RMSNorm | None = None,
        key_norm: RMSNorm | None = None,
    ) -> None:
        super().__init__(context, head_dim, sliding_window)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.rotary, self.query_norm, self.key_norm = rotary, query_norm, key_norm
        self.transform = HeadTransform(
            table=rotary.table,
            query_norm=None if query_norm is None else query_norm.weight,
            key_norm=None if key_norm is None else key_norm.weight,
            eps=0.0 if query_norm is None else query_norm.eps,
        )

    def forward_projected(
        self, projected: torch.Tensor, angles: Angles, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """projected [T, (Hq + 2 Hk) * D]: query, key and value heads -> [T, Hq * D]."""
        if self.backend.transforms_heads:
            return self.backend.forward_projected(
                projected,
                angles.positions,
                self.transform,
                kv_cache,
                metadata,
                num_heads=self.num_heads,
                scale=self.scale,
                sliding_window=self.sliding_window,
            )
        heads = projected.view(projected.shape[0], -1, self.head_dim)
        query_key, value = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = query_key.split([self.num_heads, self.num_kv_heads], dim=1)
            query_key = torch.cat([self.query_norm(query), self.key_norm(key)], dim=1)
        query, key = self.rotary.rotate(query_key, angles).split([self.num_heads, self.num_kv_heads], dim=1)
        return self.forward(query, key, value, kv_cache, metadata)
