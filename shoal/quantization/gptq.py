"""Checkpoints of AutoGPTQ and GPTQModel (GPTQ: Frantar et al. 2022, arXiv:2210.17323).

qweight int32 [K bits / 32, N], packed along the inputs; qzeros int32 [groups, N bits / 32], packed along the outputs;
scales [groups, N]; g_idx int32 [K], the group of each input, which older ones lack; bias. The lowest bits are first;
3 bits: 32 numbers in three words. Zeros are stored less one (modulo 2^bits), but for checkpoint_format gptq_v2.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import torch

from shoal.config.quantization import QuantizationConfig
from shoal.errors import ModelError
from shoal.quantization.base import LinearMethod, LinearSpec, LinearTensor, QuantizationScheme
from shoal.quantization.fp8 import is_kept
from shoal.quantization.packed_int import IntegerMatrix, PackedIntLinear, repeated, scale_of_random, unpack
from shoal.quantization.unquantized import Unquantized

# Of an input whose group was not stored.
_UNKNOWN = -(1 << 31)


class Gptq(QuantizationScheme):
    name = "gptq"

    def __init__(self, config: QuantizationConfig) -> None:
        self.config = dataclasses.replace(config, kept=(*config.kept, *_plain_patterns(config)))

    def linear(self, spec: LinearSpec, weight: torch.Tensor | None = None) -> LinearMethod:
        if weight is not None or is_kept(self.config, spec):
            return Unquantized().linear(spec, weight)
        return GptqLinear(spec, self.config)


def _plain_patterns(config: QuantizationConfig) -> list[str]:
    """GPTQModel's `dynamic`: regular expressions of modules, "-:" before those that are plain. Raises ModelError."""
    dynamic = config.raw.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise ModelError(f"quantization_config: dynamic must be an object; found {dynamic!r}")
    same: dict[str, Any] = {
        "bits": config.bits, "group_size": config.group_size, "sym": config.symmetric, "desc_act": config.desc_act,
    }  # fmt: skip
    found = []
    for pattern, changes in dynamic.items():
        if pattern.startswith("-:"):
            found.append(f"re:{pattern[2:]}")
            continue
        other = [name for name, value in (changes or {}).items() if name in same and value != same[name]]
        if other:
            raise ModelError(
                f"quantization_config: dynamic gives the modules {pattern!r} another {', '.join(other)}, which is not "
                "supported; one format for all quantized modules is, and modules that are left plain (-:)"
            )
    return found


class GptqLinear(PackedIntLinear):
    def __init__(self, spec: LinearSpec, config: QuantizationConfig) -> None:
        super().__init__(spec)
        self.config, self.bits = config, config.bits
        self.unit = Fraction(32, config.bits)
        outputs, inputs, device = spec.out_features, spec.in_features, spec.device
        all_inputs = spec.all_in_features or inputs
        self.group_size = config.group_size if config.group_size > 0 else all_inputs
        # Where the inputs were ordered, a part of them belongs to any groups: each rank has all.
        self.has_all_groups = config.group_size < 0 or config.desc_act
        num_groups = -(-(all_inputs if self.has_all_groups else inputs) // self.group_size)
        self.offset = 0 if config.raw.get("checkpoint_format") == "gptq_v2" else 1
        self.qweight = _words(inputs, self.unit, device, outputs).t().contiguous()
        self.qzeros = _words(outputs, self.unit, device, num_groups)
        self.scales = torch.empty(num_groups, outputs, device=device)
        self.g_idx = torch.full((max(1, len(spec.part_sizes)), inputs), _UNKNOWN, dtype=torch.int32, device=device)

    def tensors(self) -> list[LinearTensor]:
        by_group: dict[str, Any] = (
            {"in_dim": None} if self.has_all_groups else {"in_dim": 0, "in_unit": self.group_size}
        )
        inputs = self.spec.all_in_features or self.spec.in_features
        scale = scale_of_random(self.bits, inputs)
        # Random integers are about the middle of their range.
        zeros = repeated((1 << (self.bits - 1)) - self.offset, self.bits, self.qzeros.device)
        group_size = self.group_size
        return [
            LinearTensor(
                suffix="qweight", data=self.qweight, out_dim=1, in_dim=0, in_unit=self.unit,
                fill=lambda whole, generator: whole.random_(-(1 << 31), 1 << 31, generator=generator),
            ),
            LinearTensor(
                suffix="qzeros", data=self.qzeros, out_dim=1, out_unit=self.unit, **by_group,
                fill=lambda whole, _: whole.view(whole.shape[0], -1, len(zeros)).copy_(zeros),
            ),
            LinearTensor(
                suffix="scales", data=self.scales, out_dim=1, **by_group,
                fill=lambda whole, _: whole.fill_(scale),
            ),
            LinearTensor(
                suffix="g_idx", data=self.g_idx, out_dim=None, in_dim=0, by_part=True, optional=True,
                fill=lambda whole, _: whole.copy_(torch.arange(len(whole), device=whole.device) // group_size),
            ),
            *self.bias_tensors(),
        ]  # fmt: skip

    def matrices(self) -> list[IntegerMatrix]:
        spec, config = self.spec, self.config
        groups = self._groups()
        qweight, qzeros, scales = self.qweight, self.qzeros, self.scales
        del self.qweight, self.qzeros, self.scales, self.g_idx
        most, inputs, bits = (1 << self.bits) - 1, spec.in_features, config.bits
        zeros = (unpack(qzeros, bits)[:, : spec.out_features] + self.offset) & most
        matrix = IntegerMatrix(
            num_outputs=spec.out_features,
            num_inputs=inputs,
            bits=bits,
            group_size=self.group_size,
            read=lambda outputs: unpack(qweight[:, outputs].t().contiguous(), bits)[:, :inputs],
            scales=scales,
            zeros=None if bool((zeros == 1 << (bits - 1)).all()) else zeros,
        )
        if groups is None:
            own = -(-inputs // self.group_size)  # others may be of other ranks
            return [
                dataclasses.replace(
                    matrix, scales=scales[:own], zeros=None if matrix.zeros is None else matrix.zeros[:own]
                )
            ]
        if len(groups) == 1 or torch.equal(groups, groups[:1].expand_as(groups)):
            return [dataclasses.replace(matrix, groups_of=groups[0])]
        # Matrices whose inputs were ordered each by itself are multiplied each by itself.
        found, start = [], 0
        for part, size in enumerate(spec.part_sizes):
            found.append(dataclasses.replace(matrix.outputs(slice(start, start + size)), groups_of=groups[part]))
            start += size
        return found

    def _groups(self) -> torch.Tensor | None:
        """int64 [parts, K], the group of each input among those that are here; None where they stand in order."""
        spec, num_groups = self.spec, self.scales.shape[0]
        groups, unknown = self.g_idx.long(), self.g_idx == _UNKNOWN
        if bool(unknown.all()):
            if self.config.desc_act and not self.config.raw.get("static_groups") and self.config.group_size > 0:
                raise ModelError(
                    f"{self.name}: quantization_config says desc_act, and there is no g_idx that tells the group of "
                    "each input"
                )
            if self.has_all_groups and num_groups > 1 and spec.is_summand:
                raise ModelError(f"{self.name}: without g_idx this rank does not know which groups its inputs have")
            return None
        if bool(unknown.any()):
            raise ModelError(f"{self.name}: g_idx is there for some of these matrices, not for all")
        if not self.has_all_groups and spec.is_summand:
            groups = groups - groups.amin()
        low, high = int(groups.min()), int(groups.max())
        if low < 0 or high >= num_groups:
            raise ModelError(
                f"{self.name}: g_idx has groups {low} to {high}, the config describes {num_groups} groups of "
                f"{self.group_size} inputs"
                + ("" if self.has_all_groups else "; inputs in another order need desc_act in quantization_config")
            )
        in_order = torch.arange(groups.shape[1], device=groups.device) // self.group_size
        return None if torch.equal(groups, in_order.expand_as(groups)) else groups


def _words(count: int, unit: Fraction, device: torch.device, rows: int) -> torch.Tensor:
    """int32 [rows, words for so many numbers]; three words hold 32 of 3 bits."""
    whole = 3 if unit.denominator == 3 else 1
    return torch.empty(rows, -(-count // (unit * whole)) * whole, dtype=torch.int32, device=device)
