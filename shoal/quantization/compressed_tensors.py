"""Checkpoints of llm-compressor (compressed-tensors): FP8, INT8 and packed integers, by what the config says.

float-, int- and naive-quantized: weight [N, K] of a byte, weight_scale [1], [N, 1], [N, K / group] or by blocks.
pack-quantized: weight_packed int32 [N, K * bits / 32], the lowest bits first, 2^(bits - 1) more than the number;
weight_scale; weight_shape; where zero points are, weight_zero_point int32 [N * bits / 32, K / group], packed along N;
where inputs were ordered by activation, weight_g_idx int32 [K]: the group of each input.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch

from shoal.config.quantization import QuantizationConfig
from shoal.errors import ModelError
from shoal.quantization.base import (
    ExpertsMethod,
    ExpertsSpec,
    LinearMethod,
    LinearSpec,
    LinearTensor,
    QuantizationScheme,
)
from shoal.quantization.byte_linear import ByteFormat, ByteLinear, check_scales
from shoal.quantization.experts import grouped_experts
from shoal.quantization.fp8 import is_kept
from shoal.quantization.packed_int import IntegerMatrix, PackedIntLinear, cuts_a_group, regular_group, unpack
from shoal.quantization.unquantized import Unquantized


class CompressedTensors(QuantizationScheme):
    """Of one group of modules; `others`: of the further ones, if the config has several."""

    name = "compressed-tensors"

    def __init__(self, config: QuantizationConfig) -> None:
        self.config = config
        self.others = [CompressedTensors(other) for other in config.others]
        self.packed = config.raw.get("format") == "pack-quantized"
        activations = config.activations
        (group,) = config.raw["config_groups"].values()
        if not (group.get("input_activations") or {}).get("symmetric", True):
            if activations == "static_tensor":
                raise ModelError(
                    "quantization_config: static input_activations with zero points (symmetric: false) are not "
                    "supported; dynamic or symmetric ones are"
                )
            activations = "none"  # rows as they are lose nothing
        if not self.packed and not config.symmetric:
            raise ModelError(
                f"quantization_config: weights with zero points (symmetric: false) in format "
                f"{config.raw.get('format')!r} are not supported; in pack-quantized they are"
            )
        block, scales = config.block, config.scales
        if scales == "group":
            block, scales = (1, config.group_size), "block"
            if config.group_size < 0:
                scales = "channel"
        self.form = ByteFormat(
            dtype=torch.float8_e4m3fn if config.kind == "float" else torch.int8,
            scales=scales,
            block=block,
            activations=activations,
        )

    def linear(self, spec: LinearSpec, weight: torch.Tensor | None = None) -> LinearMethod:
        if weight is not None or is_kept(self.config, spec):
            return Unquantized().linear(spec, weight)
        scheme = self._scheme_of(spec)
        if scheme.packed:
            return PackedLinear(spec, scheme.config, scheme.form)
        return ByteLinear(spec, scheme.form)

    def experts(self, spec: ExpertsSpec) -> ExpertsMethod | None:
        return grouped_experts(spec, self)

    def _scheme_of(self, spec: LinearSpec) -> CompressedTensors:
        """Raises ModelError where the matrices of a layer are of several groups."""
        schemes = (self, *self.others)
        found = [schemes[self.config.format_of(name) or 0] for name in spec.names] or [self]
        for name, scheme in zip(spec.names, found, strict=False):
            if scheme is not found[0]:
                raise ModelError(
                    f"quantization_config: {spec.names[0]} is {found[0].config.describe()}, and {name} is "
                    f"{scheme.config.describe()}: these are one layer here, whose matrices must be held alike"
                )
        return found[0]


class PackedLinear(PackedIntLinear):
    """Integers of 4 or 8 bits in int32."""

    def __init__(self, spec: LinearSpec, config: QuantizationConfig, form: ByteFormat) -> None:
        super().__init__(spec)
        if form.scales == "tensor" or (form.scales == "block" and form.block[0] != 1):
            raise ModelError(
                f"quantization_config: pack-quantized with scales by {config.scales} is not supported; by channel and "
                "group it is"
            )
        self.bits = config.bits
        self.per_word = 32 // config.bits
        self.group = form.block[1] if form.scales == "block" else 0
        outputs, inputs, device = spec.out_features, spec.in_features, spec.device
        num_parts = max(1, len(spec.part_sizes))
        self.all_inputs = spec.all_in_features or inputs
        # A part of inputs that were ordered belongs to all groups, or a group is cut: each rank has them all.
        is_cut = self.group > 0 and cuts_a_group(spec, self.group)
        self.has_all_groups = is_cut or (config.desc_act and self.all_inputs > inputs)
        num_groups = -(-(self.all_inputs if self.has_all_groups else inputs) // self.group) if self.group else 1
        self.packed = torch.empty(outputs, -(-inputs // self.per_word), dtype=torch.int32, device=device)
        self.scales = torch.empty(outputs, num_groups, device=device)
        self.shape = torch.empty(num_parts, 2, dtype=torch.int64, device=device)
        self.zeros: torch.Tensor | None = None
        if not config.symmetric:
            words = -(-outputs // self.per_word)
            self.zeros = torch.empty(words, num_groups, dtype=torch.int32, device=device)
        self.group_of: torch.Tensor | None = None
        if config.desc_act:
            self.group_of = torch.empty(num_parts, inputs, dtype=torch.int32, device=device)

    def tensors(self) -> list[LinearTensor]:
        by_group: dict[str, Any] = {"in_dim": None}
        if self.group and not self.has_all_groups:
            by_group = {"in_dim": 1, "in_unit": self.group}
        # Random integers are uniform.
        scale = 1 / (2.0**self.bits / 12**0.5 * self.all_inputs**0.5)
        words = LinearTensor(
            suffix="weight_packed", data=self.packed, out_dim=0, in_dim=1, in_unit=self.per_word,
            fill=lambda whole, generator: whole.random_(-(1 << 31), 1 << 31, generator=generator),
        )  # fmt: skip
        scales = LinearTensor(
            suffix="weight_scale", data=self.scales, out_dim=0, **by_group, fill=lambda whole, _: whole.fill_(scale)
        )
        shape = LinearTensor(
            suffix="weight_shape", data=self.shape, out_dim=None, in_dim=None, by_part=True,
            fill=lambda whole, _: whole.fill_(1 << 40),
        )  # fmt: skip
        found = [words, scales, shape, *self.bias_tensors()]
        if self.zeros is not None:
            middle = sum((1 << (self.bits - 1)) << shift for shift in range(0, 32, self.bits)) - (1 << 32)
            found.append(
                LinearTensor(
                    suffix="weight_zero_point", data=self.zeros, out_dim=0, out_unit=self.per_word, **by_group,
                    fill=lambda whole, _: whole.fill_(middle),
                )
            )  # fmt: skip
        if self.group_of is not None:
            group = self.group or self.all_inputs
            found.append(
                LinearTensor(
                    suffix="weight_g_idx", data=self.group_of, out_dim=None, in_dim=0, by_part=True,
                    fill=lambda whole, _: whole.copy_(torch.arange(whole.numel(), device=whole.device) // group),
                )
            )  # fmt: skip
        return found

    @property
    def regular_group(self) -> int | None:
        if self.group_of is not None:
            return None
        return regular_group(self.spec, self.group or self.spec.in_features, self.has_all_groups)

    def matrices(self) -> list[IntegerMatrix]:
        spec = self.spec
        sizes = spec.part_sizes or (spec.out_features,)
        for (outputs, inputs), size in zip(self.shape.tolist(), sizes, strict=True):
            if outputs < size or inputs < self.all_inputs:
                raise ModelError(
                    f"{self.name}: weight_shape says {outputs} × {inputs}, the config describes at least {size} × "
                    f"{self.all_inputs}"
                )
        check_scales(self.scales, spec, "weight_scale")
        packed, bits, scales = self.packed, self.bits, self.scales.t().contiguous()
        zeros = None if self.zeros is None else unpack(self.zeros.t().contiguous(), bits)[:, : spec.out_features]
        parts = [slice(0, spec.out_features)]
        groups: list[torch.Tensor | None] = [None]
        if self.group_of is not None:
            self._check_groups(self.group_of, scales.shape[0])
            first, *others = self.group_of.long()
            groups = [first]
            if not all(torch.equal(first, other) for other in others):
                groups = [first, *others]
                ends = list(itertools.accumulate(sizes))
                parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        del self.packed, self.scales, self.zeros, self.shape, self.group_of

        def read(part: slice, own: slice) -> torch.Tensor:
            return unpack(packed[part][own], bits)[:, : spec.in_features]

        found = [
            IntegerMatrix(
                num_outputs=part.stop - part.start,
                num_inputs=spec.in_features,
                bits=bits,
                group_size=self.group or spec.in_features,
                read=functools.partial(read, part),
                scales=scales[:, part],
                zeros=None if zeros is None else zeros[:, part],
                groups_of=group_of,
            )
            for part, group_of in zip(parts, groups, strict=True)
        ]
        if self.has_all_groups and groups[0] is None:
            return [matrix.from_input(spec.in_start) for matrix in found]
        return found

    def _check_groups(self, group_of: torch.Tensor, num_groups: int) -> None:
        if int(group_of.min()) < 0 or int(group_of.max()) >= num_groups:
            raise ModelError(
                f"{self.name}: weight_g_idx names the groups {int(group_of.min())} to {int(group_of.max())}, and "
                f"weight_scale has {num_groups}; the checkpoint is broken"
            )
