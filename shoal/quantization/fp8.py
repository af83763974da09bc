"""FP8 (e4m3) checkpoints, and plain ones that are quantized to it while they are loaded.

Scales by matrix (weight_scale []), by output (fbgemm_fp8: weight_scale [N, 1]), or by blocks as DeepSeek and Qwen3 ship
them (weight_scale_inv [N / 128, K / 128]: what to multiply by, in spite of its name).
"""

from __future__ import annotations

import torch

from shoal.config.quantization import QuantizationConfig
from shoal.errors import ModelError
from shoal.quantization.base import ExpertsMethod, ExpertsSpec, LinearMethod, LinearSpec, QuantizationScheme
from shoal.quantization.byte_linear import ByteFormat, ByteLinear, QuantizedWhileLoading
from shoal.quantization.experts import grouped_experts
from shoal.quantization.unquantized import Unquantized


class Fp8(QuantizationScheme):
    name = "fp8"

    def __init__(self, config: QuantizationConfig) -> None:
        assert config.scales != "group", config
        self.config = config
        self.form = ByteFormat(
            dtype=torch.float8_e4m3fn,
            scales=config.scales,
            block=config.block,
            activations=config.activations,
            scale_names=("weight_scale", "weight_scale_inv"),
            input_scale_names=("input_scale", "activation_scale"),
        )

    def linear(self, spec: LinearSpec, weight: torch.Tensor | None = None) -> LinearMethod:
        if weight is not None or is_kept(self.config, spec):
            return Unquantized().linear(spec, weight)
        if self.config.on_the_fly:
            return QuantizedWhileLoading(spec, self.form.dtype)
        return ByteLinear(spec, self.form)

    def experts(self, spec: ExpertsSpec) -> ExpertsMethod | None:
        return grouped_experts(spec, self)


def is_kept(config: QuantizationConfig, spec: LinearSpec) -> bool:
    """Whether the checkpoint holds the matrices of a layer plain. Raises ModelError where that is so of a part only."""
    kept = [name for name in spec.names if config.keeps(name)]
    if kept and len(kept) < len(spec.names):
        rest = [name for name in spec.names if name not in kept]
        raise ModelError(
            f"quantization_config keeps {', '.join(kept)} as it is, but not {', '.join(rest)}: these are one layer "
            "here, whose matrices must be held alike"
        )
    return bool(kept)
