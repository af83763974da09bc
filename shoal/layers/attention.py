"""The attention of one layer: its scale, its window and its KV cache. The backend does the work."""

from __future__ import annotations

import torch
from torch import nn

from shoal.attention.base import AttentionMetadata
from shoal.layers.context import BuildContext


class Attention(nn.Module):
    """Hq query heads, Hk KV heads of this rank, D head size, T tokens."""

    def __init__(self, context: BuildContext, head_dim: int, sliding_window: int | None) -> None:
        super().__init__()
        self.backend = context.attention_backend
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
