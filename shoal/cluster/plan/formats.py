"""How checkpoints hold matrices: plain, or quantized by GPTQ, AWQ, FP8 or INT8; in bytes, by what they are for.

Layouts, O outputs, I inputs, groups of G inputs: GPTQ: qweight int32 [I·bits/32, O], qzeros int32 [I/G, O·bits/32],
scales fp16 [I/G, O], g_idx int32 [I]. AWQ: the same without g_idx, packed along O. FP8: one byte an element and fp32
scales for the matrix, for each output, or for each block (DeepSeek-V3: 128 × 128). INT8: a byte, a scale an output.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from shoal.errors import ConfigError, ModelError

# What --quantization takes, and what a config's quant_method may be; the first of a line is the method's name.
METHODS = {
    "gptq": ("gptq", "gptq_marlin"),
    "awq": ("awq", "awq_marlin"),
    "fp8": ("fp8", "fbgemm_fp8"),
    "int8": ("int8", "w8a8_int8"),
    "compressed-tensors": ("compressed-tensors", "compressed_tensors"),
}
CHOICES = tuple(name for names in METHODS.values() for name in names if name != "compressed_tensors")
_GROUP = 128


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
    """A checkpoint's, or the one that is asked for. kept: modules that are left as they are, by name or regex."""

    method: str
    format: Format
    kept: tuple[str, ...] = ()
    quantizes_head: bool = False
    is_assumed: bool = False

    def keeps(self, module: str) -> bool:
        """module: its full name, such as model.layers.3.self_attn.q_proj."""
        for pattern in self.kept:
            if pattern.startswith("re:"):
                if re.match(pattern[3:], module):
                    return True
            elif pattern == module or f".{pattern}." in f".{module}.":
                return True
        return False

    def describe(self) -> str:
        each = self.format
        size = {"group": f", groups of {each.group_size}", "block": ", blocks of {} × {}".format(*each.block)}
        return f"{self.method} {each.bits} bits{size.get(each.scales, f', a scale for each {each.scales}')}"


def method_of(name: str) -> str:
    """The method of a name that --quantization takes. Raises ConfigError."""
    for method, names in METHODS.items():
        if name in names:
            return method
    raise ConfigError(f"quantization {name!r} is not known; known: {', '.join(CHOICES)}")


def quantization_of(raw: Mapping[str, Any], wanted: str | None) -> Quantization | None:
    """What a config.json says, or what is wanted of a checkpoint that is not quantized; None: neither.

    Raises ModelError for a method that is not known, ConfigError where the wish contradicts the checkpoint.
    """
    found = raw.get("quantization_config") or raw.get("compression_config")
    if not found:
        return None if wanted is None else _assumed(wanted)
    if not isinstance(found, dict):
        raise ModelError(f"quantization_config must be an object; found {found!r}")
    name = str(found.get("quant_method", ""))
    if not any(name in names for names in METHODS.values()):
        known = ", ".join(method for method in METHODS if method != "int8")
        raise ModelError(f"quantization method {name!r} of the checkpoint is not known; known: {known}")
    quantization = _READERS[method_of(name)](found, name)
    fits = {quantization.method, method_of(name)}
    if wanted is not None and method_of(wanted) not in fits:
        raise ConfigError(
            f"--quantization {wanted} contradicts the checkpoint, which is quantized by {name}; leave the option out"
        )
    return quantization


def _assumed(wanted: str) -> Quantization:
    method = method_of(wanted)
    formats = {
        "gptq": Format(method="gptq", bits=4, scales="group", group_size=_GROUP, has_zeros=True, has_g_idx=True),
        "awq": Format(method="awq", bits=4, scales="group", group_size=_GROUP, has_zeros=True),
        "fp8": Format(method="fp8", bits=8, scales="channel", scale_itemsize=4, computes_in_fp8=True),
        "int8": Format(method="int8", bits=8, scales="channel", scale_itemsize=4, computes_in_int8=True),
    }
    if method not in formats:
        raise ConfigError(
            f"--quantization {wanted} is a container of several layouts, and the checkpoint does not say which; "
            f"of a checkpoint that is not quantized one can ask {', '.join(formats)}"
        )
    return Quantization(method, formats[method], is_assumed=True)


def _integer(found: Mapping[str, Any], name: str, default: int) -> int:
    value = found.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelError(f"quantization_config: {name} must be an integer; found {value!r}")
    return value


def _patterns(found: Mapping[str, Any]) -> tuple[str, ...]:
    for name in ("modules_to_not_convert", "ignored_layers", "ignore"):
        if found.get(name):
            return tuple(map(str, found[name]))
    return ()


def _bits(found: Mapping[str, Any], name: str, default: int, known: tuple[int, ...]) -> int:
    bits = _integer(found, name, default)
    if bits not in known:
        raise ModelError(f"quantization_config: {name} {bits} is not known; known: {', '.join(map(str, known))}")
    return bits


def _gptq(found: Mapping[str, Any], name: str) -> Quantization:
    bits = _bits(found, "bits", 4, (2, 3, 4, 8))
    group = _integer(found, "group_size", _GROUP)
    each = Format(method="gptq", bits=bits, scales="group", group_size=group, has_zeros=True, has_g_idx=True)
    return Quantization("gptq", each, _patterns(found), quantizes_head=found.get("lm_head") is True)


def _awq(found: Mapping[str, Any], name: str) -> Quantization:
    bits = _bits(found, "bits", 4, (4, 8))
    group = _integer(found, "group_size", _GROUP)
    has_zeros = bool(found.get("zero_point", True))
    each = Format(method="awq", bits=bits, scales="group", group_size=group, has_zeros=has_zeros)
    return Quantization("awq", each, _patterns(found))


def _fp8(found: Mapping[str, Any], name: str) -> Quantization:
    each = Format(method="fp8", bits=8, scales="tensor", scale_itemsize=4, computes_in_fp8=True)
    block = found.get("weight_block_size")
    if name == "fbgemm_fp8":
        each = dataclasses.replace(each, scales="channel")
    elif block is not None:
        if (
            not isinstance(block, list)
            or len(block) != 2
            or not all(isinstance(size, int) and size > 0 for size in block)
        ):
            raise ModelError(f"quantization_config: weight_block_size must be two sizes; found {block!r}")
        each = dataclasses.replace(each, scales="block", block=(block[0], block[1]))
    if found.get("activation_scheme") == "static":
        each = dataclasses.replace(each, module_bytes=4)
    return Quantization("fp8", each, _patterns(found))


def _compressed(found: Mapping[str, Any], name: str) -> Quantization:
    groups = found.get("config_groups") or {}
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ModelError(f"compressed-tensors with {len(groups)} config_groups is not known; one group for all is")
    (group,) = groups.values()
    weights = group.get("weights") or {}
    bits, kind = _bits(weights, "num_bits", 8, (4, 8)), str(weights.get("type", "int"))
    strategy = str(weights.get("strategy", "channel"))
    if strategy not in ("tensor", "channel", "group", "block"):
        raise ModelError(
            f"compressed-tensors with scales by {strategy} is not known; tensor, channel, group, block are"
        )
    block = weights.get("block_structure") or [128, 128]
    is_packed = bits < 8
    computes = group.get("input_activations") is not None
    each = Format(
        method="fp8" if kind == "float" else "compressed-tensors" if is_packed else "int8",
        bits=bits,
        scales=strategy,
        scale_itemsize=2,
        group_size=_integer(weights, "group_size", _GROUP) if strategy == "group" else 0,
        block=(int(block[0]), int(block[1])) if strategy == "block" else (0, 0),
        has_zeros=is_packed and not weights.get("symmetric", True),
        module_bytes=16 if is_packed else 0,  # weight_shape: two int64
        computes_in_fp8=computes and kind == "float",
        computes_in_int8=computes and kind == "int" and not is_packed,
    )
    return Quantization("compressed-tensors", each, _patterns(found))


def _int8(found: Mapping[str, Any], name: str) -> Quantization:
    each = Format(method="int8", bits=8, scales="channel", scale_itemsize=4, computes_in_int8=True)
    return Quantization("int8", each, _patterns(found))


_READERS = {"gptq": _gptq, "awq": _awq, "fp8": _fp8, "compressed-tensors": _compressed, "int8": _int8}
