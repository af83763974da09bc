"""BuildContext: everything a layer is told when it is made, passed down from the worker. No globals."""

from __future__ import annotations

import dataclasses

import torch

from shoal.attention.base import AttentionBackend
from shoal.distributed.parallel_dims import ParallelDims
from shoal.quantization.base import QuantizationScheme
from shoal.quantization.unquantized import Unquantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildContext:
    """How this rank builds its part of the model.

    layer_range: the layers of this pipeline stage; None is all. max_model_len: rows of position tables; None is the
    model's own limit.
    """

    dtype: torch.dtype
    device: torch.device
    attention_backend: AttentionBackend
    deterministic: bool = False
    quantization: QuantizationScheme = dataclasses.field(default_factory=Unquantized)
    parallel: ParallelDims = dataclasses.field(default_factory=ParallelDims)
    layer_range: range | None = None
    max_model_len: int | None = None
