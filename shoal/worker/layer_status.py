"""LayerStatus: says in the status record which layer a rank is in. The model runner of one of several ranks uses it."""

from __future__ import annotations

import torch

from shoal.attention.base import AttentionMetadata
from shoal.distributed.status import StatusRecord
from shoal.kv_transfer.hooks import LayerHooks


class LayerStatus(LayerHooks):
    """Around the hooks of a connector, if there is one. On a GPU the layer is the one whose work is being queued."""

    def __init__(self, status: StatusRecord, hooks: LayerHooks | None = None) -> None:
        self._status = status
        self._hooks = hooks or LayerHooks()

    def before_layer(self, layer_index: int, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> None:
        self._status.enter_layer(layer_index)
        self._hooks.before_layer(layer_index, kv_cache, metadata)

    def after_layer(self, layer_index: int, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> None:
        self._hooks.after_layer(layer_index, kv_cache, metadata)
