"""Checkpoints of AutoGPTQ and GPTQModel (GPTQ: Frantar et al. 2022, arXiv:2210.17323).

qweight int32 [K bits / 32, N], packed along the inputs; qzeros int32 [groups, N bits / 32], packed along the outputs;
scales [groups, N]; g_idx int32 [K], the group of each input, which older ones lack; bias. The lowest bits are first;
3 bits: 32 numbers in three words. Zeros are stored less one (modulo 2^bits), but for checkpoint_format gptq_v2.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from fractions import Fraction
from typing import Any

import torch

from shoal.config.quantization import QuantizationConfig, check_expression, read_quantization
from shoal.errors import ModelError
from shoal.quantization.base import (
    ExpertsMethod,
    ExpertsSpec,
    LinearMethod,
    LinearSpec,
    LinearTensor,
    QuantizationScheme,
)
from shoal.quantization.experts import grouped_experts
from shoal.quantization.packed_int import (
    IntegerMatrix,
    PackedIntLinear,
    cuts_a_group,
    regular_group,
    repeated,
    scale_of_random,
    unpack,
)
from shoal.quantization.unquantized import Unquantized

# Of an input whose group was not stored.
_UNKNOWN = -(1 << 31)


class Gptq(QuantizationScheme):
    name = "gptq"

    def __init__(self, config: QuantizationConfig) -> None:
        self.config = config
        self._rules = _rules(config)

    def linear(self, spec: LinearSpec, weight: torch.Tensor | None = None) -> LinearMethod:
        if weight is not None:
            return Unquantized().linear(spec, weight)
        config = self._config_of(spec)
        return Unquantized().linear(spec) if config is None else GptqLinear(spec, config)

    def experts(self, spec: ExpertsSpec) -> ExpertsMethod | None:
        return grouped_experts(spec, self)

    def _config_of(self, spec: LinearSpec) -> QuantizationConfig | None:
        """None: plain. Raises ModelError where the matrices of a layer are held in different ways."""
        if not spec.names:
            return self.config
        first, *others = [self._config_of_module(name) for name in spec.names]
        for name, other in zip(spec.names[1:], others, strict=True):
            if _layout(other) != _layout(first):
                raise ModelError(
                    f"quantization_config: {spec.names[0]} is {_described(first)}, and {name} is {_described(other)}: "
                    "these are one layer here, whose matrices must be held alike"
                )
        return first

    def _config_of_module(self, name: str) -> QuantizationConfig | None:
        if self.config.keeps(name):
            return None
        return next((config for expression, config in self._rules if expression.match(name)), self.config)


def _layout(config: QuantizationConfig | None) -> tuple[Any, ...] | None:
    """What a layer's tensors depend on, of all that the checkpoint says; None: plain."""
    if config is None:
        return None
    return config.bits, config.group_size, config.desc_act, config.raw.get("checkpoint_format")


def _described(config: QuantizationConfig | None) -> str:
    return "plain" if config is None else config.describe()


def _rules(config: QuantizationConfig) -> list[tuple[re.Pattern[str], QuantizationConfig | None]]:
    """GPTQModel's `dynamic`, of which the first that a module matches counts: "-:" and an expression, those that are
    plain (None); "+:" or nothing before it, those whose bits, groups or order are others. Raises ModelError."""
    dynamic = config.raw.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise ModelError(f"quantization_config: dynamic must be an object; found {dynamic!r}")
    rules: list[tuple[re.Pattern[str], QuantizationConfig | None]] = []
    for key, changes in dynamic.items():
        expression = key[2:] if key.startswith(("-:", "+:")) else key
        check_expression("dynamic", expression)
        own: QuantizationConfig | None = None
        if not key.startswith("-:"):
            if not isinstance(changes or {}, dict):
                raise ModelError(f"quantization_config: dynamic gives {key!r} {changes!r}; an object is read")
            own = read_quantization(config.raw | (changes or {}) | {"quant_method": "gptq"})
        rules.append((re.compile(expression), own))
    return rules


class GptqLinear(PackedIntLinear):
    def __init__(self, spec: LinearSpec, config: QuantizationConfig) -> None:
        super().__init__(spec)
        self.config, self.bits = config, config.bits
        self.unit = Fraction(32, config.bits)
        outputs, inputs, device = spec.out_features, spec.in_features, spec.device
        all_inputs = spec.all_in_features or inputs
        self.group_size = config.group_size if config.group_size > 0 else all_inputs
        # Where the inputs were ordered, a part of them belongs to any groups; or a group is cut: each rank has all.
        self.has_all_groups = config.group_size < 0 or config.desc_act or cuts_a_group(spec, self.group_size)
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

    @property
    def regular_group(self) -> int | None:
        return None if self.config.desc_act else regular_group(self.spec, self.group_size, self.has_all_groups)

    def is_in_order(self) -> bool:
        return self._groups is None

    def matrices(self) -> list[IntegerMatrix]:
        spec, config = self.spec, self.config
        groups = self._groups
        del self._groups
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
            return [matrix.from_input(spec.in_start) if self.has_all_groups else matrix]
        if len(groups) == 1 or torch.equal(groups, groups[:1].expand_as(groups)):
            return [dataclasses.replace(matrix, groups_of=groups[0])]
        # Matrices whose inputs were ordered each by itself are multiplied each by itself.
        found, start = [], 0
        for part, size in enumerate(spec.part_sizes):
            found.append(dataclasses.replace(matrix.outputs(slice(start, start + size)), groups_of=groups[part]))
            start += size
        return found

    @functools.cached_property
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
        start = spec.in_start if self.has_all_groups else 0
        in_order = torch.arange(start, start + groups.shape[1], device=groups.device) // self.group_size
        return None if torch.equal(groups, in_order.expand_as(groups)) else groups


def _words(count: int, unit: Fraction, device: torch.device, rows: int) -> torch.Tensor:
    """int32 [rows, words for so many numbers]; three words hold 32 of 3 bits."""
    whole = 3 if unit.denominator == 3 else 1
    return torch.empty(rows, -(-count // (unit * whole)) * whole, dtype=torch.int32, device=device)
