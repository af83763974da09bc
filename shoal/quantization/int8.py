"""INT8 checkpoints (weight int8 [N, K], weight_scale [N] or [N, 1]), and plain ones quantized while loading."""

from __future__ import annotations

import torch

from shoal.config.quantization import QuantizationConfig
from shoal.quantization.base import ExpertsMethod, ExpertsSpec, LinearMethod, LinearSpec, QuantizationScheme
from shoal.quantization.byte_linear import ByteFormat, ByteLinear, QuantizedWhileLoading
from shoal.quantization.experts import grouped_experts
from shoal.quantization.fp8 import is_kept
from shoal.quantization.unquantized import Unquantized


class Int8(QuantizationScheme):
    name = "int8"

    def __init__(self, config: QuantizationConfig) -> None:
        self.config = config
        self.form = ByteFormat(dtype=torch.int8, scales="channel", activations=config.activations)

    def linear(self, spec: LinearSpec, weight: torch.Tensor | None = None) -> LinearMethod:
        if weight is not None or is_kept(self.config, spec):
            return Unquantized().linear(spec, weight)
        if self.config.on_the_fly:
            return QuantizedWhileLoading(spec, self.form.dtype)
        return ByteLinear(spec, self.form)

    def experts(self, spec: ExpertsSpec) -> ExpertsMethod | None:
        return grouped_experts(spec, self)
