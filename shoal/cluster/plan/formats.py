"""How checkpoints hold matrices, in bytes by what they are for: what `config.quantization` reads, for the planner.

Layouts, O outputs, I inputs, groups of G inputs: GPTQ: qweight int32 [I·bits/32, O], qzeros int32 [I/G, O·bits/32],
scales fp16 [I/G, O], g_idx int32 [I]. AWQ: the same without g_idx, packed along O. FP8: one byte an element and fp32
scales for the matrix, for each output, or for each block (DeepSeek-V3: 128 × 128). INT8: a byte, a scale an output.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from shoal.config.quantization import ON_THE_FLY, QuantizationConfig, method_of, read_quantization
from shoal.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of one matrix."""

    values: int
    scales: int = 0
    zeros: int = 0
    g_idx: int = 0

    @property
    def total(self) -> int:
        return self.values + self.scales + self.zeros + self.g_idx


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """method "": plain, in the model's dtype. scales: for each "tensor", "channel", "group" or "block"."""

    method: str = ""
    bits: int = 16
    scales: str = ""
    scale_itemsize: int = 2
    group_size: int = 0
    block: tuple[int, int] = (0, 0)
    has_zeros: bool = False
    has_g_idx: bool = False
    # Bytes of each module besides: scales of its inputs, the packed matrix's shape.
    module_bytes: int = 0
    computes_in_fp8: bool = False
    computes_in_int8: bool = False

    @property
    def is_plain(self) -> bool:
        return not self.method

    def sizes(self, out_features: int, in_features: int, itemsize: int, *, is_fused: bool = False) -> Sizes:
        """itemsize: of the model's dtype. is_fused: what a module has once is counted with the matrix before."""
        if self.is_plain:
            return Sizes(out_features * in_features * itemsize)
        values = out_features * -(-in_features * self.bits // 32) * 4 if self.bits < 8 else out_features * in_features
        group = self.group_size if self.group_size > 0 else in_features
        num_groups = -(-in_features // group)
        num_scales = {
            "tensor": 0 if is_fused else 1,
            "channel": out_features,
            "group": num_groups * out_features,
            "block": _blocks(out_features, self.block[0]) * _blocks(in_features, self.block[1]),
        }[self.scales]
        return Sizes(
            values=values,
            scales=num_scales * self.scale_itemsize + (0 if is_fused else self.module_bytes),
            zeros=num_groups * -(-out_features * self.bits // 32) * 4 if self.has_zeros else 0,
            g_idx=4 * in_features if self.has_g_idx and not is_fused else 0,
        )

    def can_cut_inputs(self, in_features: int, degree: int) -> bool:
        """Whether each rank's part of the inputs has whole groups, and whole blocks, of its own."""
        unit = {"group": self.group_size, "block": self.block[1]}.get(self.scales, 0)
        part = in_features // degree
        return degree == 1 or unit <= 0 or part % unit == 0


def _blocks(size: int, block: int) -> int:
    return -(-size // block) if block else 1


@dataclasses.dataclass(frozen=True)
class Quantization:
    """A checkpoint's, or (is_assumed) the one that is asked for of a plain checkpoint."""

    config: QuantizationConfig
    format: Format
    is_assumed: bool = False


def quantization_of(found: Any, wanted: str | None) -> Quantization | None:
    """What a checkpoint says of itself (`found`), or what is wanted of one that is not quantized; None: neither.

    Raises ModelError for what is not known, ConfigError where the wish contradicts the checkpoint.
    """
    if found or wanted is None or method_of(wanted) in ON_THE_FLY:
        config = read_quantization(found or None, wanted)
        return None if config is None else Quantization(config, format_of(config), is_assumed=config.on_the_fly)
    method = method_of(wanted)
    if method not in ("gptq", "awq"):
        raise ConfigError(
            f"--quantization {wanted} says too little of a checkpoint that is not quantized; one can ask gptq, awq, "
            f"{', '.join(ON_THE_FLY)}"
        )
    config = read_quantization({"quant_method": method, "bits": 4, "group_size": 128})
    assert config is not None
    return Quantization(config, format_of(config), is_assumed=True)


# Bytes of a scale: of the makers that write them in the model's dtype, and of MXFP4's powers of two.
_SCALE_BYTES = {"gptq": 2, "awq": 2, "compressed-tensors": 2, "mxfp4": 1}


def format_of(config: QuantizationConfig) -> Format:
    is_packed = config.raw.get("format") == "pack-quantized"
    quantizes_rows = config.activations != "none"
    return Format(
        method=config.method,
        bits=config.bits,
        scales=config.scales,
        scale_itemsize=_SCALE_BYTES.get(config.method, 4),
        group_size=config.group_size,
        block=config.block,
        has_zeros=config.method == "gptq" or not config.symmetric,
        has_g_idx=config.method == "gptq" or config.desc_act,
        # weight_shape, two int64; the scale of the inputs.
        module_bytes=(16 if is_packed else 0) + (4 if config.activations == "static_tensor" else 0),
        computes_in_fp8=quantizes_rows and config.kind == "float",
        computes_in_int8=quantizes_rows and config.kind == "int",
    )
