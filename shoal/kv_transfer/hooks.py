"""The runner's side of KV transfer: called before and after each layer of a step. The default does nothing."""

from __future__ import annotations

import torch

from shoal.attention.base import AttentionMetadata


class LayerHooks:
    """Base and null object. A connector overrides what it needs, and waits no longer than for its data."""

    def before_layer(self, layer_index: int, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> None:
        """The layer is about to write and read `kv_cache`: blocks that it loads must have arrived on return."""

    def after_layer(self, layer_index: int, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> None:
        """The layer's keys and values of this step are written: blocks that it saves may leave."""
