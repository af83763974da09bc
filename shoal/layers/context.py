"""BuildContext: everything a layer is told when it is made, passed down from the worker. No globals."""

from __future__ import annotations

import dataclasses

import torch

from shoal.attention.base import AttentionBackend
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.parallel_dims import ParallelDims
from shoal.layers.lora import AdapterSlots
from shoal.quantization.base import QuantizationScheme
from shoal.quantization.unquantized import Unquantized


def _alone() -> GroupCoordinator:
    return GroupCoordinator([0], 0, name="tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildContext:
    """How this rank builds its part of the model.

    parallel, tensor_group: this rank's place in the grid, and the ranks that share its layers: as many as
    `parallel.tensor_size`.
    layer_range: the layers of this pipeline stage; None is all. max_model_len: rows of position tables; None is the
    model's own limit. cache_dtype: of the KV cache; None is dtype. adapters: room for them in the linear layers.
    """

    dtype: torch.dtype
    device: torch.device
    attention_backend: AttentionBackend
    deterministic: bool = False
    quantization: QuantizationScheme = dataclasses.field(default_factory=Unquantized)
    parallel: ParallelDims = dataclasses.field(default_factory=ParallelDims)
    tensor_group: GroupCoordinator = dataclasses.field(default_factory=_alone)
    layer_range: range | None = None
    max_model_len: int | None = None
    cache_dtype: torch.dtype | None = None
    adapters: AdapterSlots | None = None
