"""MXFP4 experts as gpt-oss ships them: 4-bit floats in groups of 32 with a power of two each (OCP Microscaling Formats
1.0, 2023). All else of such a checkpoint is plain.

blocks uint8 [N, K / 32, 16]: two numbers a byte, the first in the lower half: sign, two bits of exponent, one of
mantissa, so 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. scales uint8 [N, K / 32]: exponents, 127 too large.
They stay so in memory. N outputs, K inputs, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from shoal.config.quantization import QuantizationConfig
from shoal.errors import ConfigError, ModelError
from shoal.kernels.support import has_kernels
from shoal.quantization.base import (
    ExpertsMethod,
    ExpertsSpec,
    ExpertTensor,
    LinearMethod,
    LinearSpec,
    LinearTensor,
    QuantizationScheme,
)
from shoal.quantization.looped_experts import LoopedExperts
from shoal.quantization.unquantized import Unquantized

GROUP = 32
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Of random numbers of all magnitudes.
_MEAN_SQUARE = sum(value * value for value in _MAGNITUDES) / len(_MAGNITUDES)
# Exponents above are no weights: 240 means 2^113. The kernels count on it.
LARGEST_EXPONENT = 240


class Mxfp4(QuantizationScheme):
    name = "mxfp4"

    def __init__(self, config: QuantizationConfig) -> None:
        self.config = config

    def linear(self, spec: LinearSpec, weight: torch.Tensor | None = None) -> LinearMethod:
        if weight is not None or not self._quantizes(spec.names):
            return Unquantized().linear(spec, weight)
        return Mxfp4Linear(spec)

    def experts(self, spec: ExpertsSpec) -> ExpertsMethod | None:
        names = {*(name for names in spec.gate_up_names for name in names), *spec.down_names}
        if not self._quantizes(tuple(names)):
            return Unquantized().experts(spec)
        if len(names) > 2:
            raise ModelError(
                f"MXFP4 experts are read where one tensor holds all of a layer, as gpt-oss has them; {min(names)} "
                "would be one of several"
            )
        if not has_kernels(spec.device):
            return Mxfp4Experts.of(spec, self)
        if spec.deterministic:
            raise ConfigError(
                "deterministic mode does not multiply MXFP4 experts on a GPU; leave it off (--no-deterministic)"
            )
        method: ExpertsMethod = importlib.import_module("shoal.quantization.mxfp4_cuda").Mxfp4CudaExperts(spec)
        return method

    def _quantizes(self, names: Sequence[str]) -> bool:
        return any(".experts." in f"{name}." for name in names) and not any(self.config.keeps(name) for name in names)


class Mxfp4Linear(LinearMethod):
    """Dequantized for each product, in which it is as if it was plain. bias: in the layer's dtype, [N] or None."""

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec
        self.blocks, self.scales, self.bias = empty_mxfp4(spec, spec.out_features, spec.in_features, spec.bias)

    def tensors(self) -> list[LinearTensor]:
        return mxfp4_tensors(self.blocks, self.scales, self.bias)

    def process_after_load(self) -> None:
        check_scales(self.scales, self.spec.names)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        spec = self.spec
        weight = dequantize(self.blocks, self.scales, spec.dtype)
        if not spec.deterministic:
            return F.linear(x, weight, self.bias)
        plain = Unquantized().linear(dataclasses.replace(spec, bias=False), weight)
        plain.bias = self.bias  # type: ignore[attr-defined]
        plain.process_after_load()
        return plain.apply(x)

    def weight_bytes(self) -> int:
        return self.blocks.nbytes + self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)


class Mxfp4Experts(LoopedExperts):
    """On a CPU, and a GPU without the kernels: each expert that has tokens is dequantized for its product. Stacked, as
    the checkpoint has them."""

    def __init__(self, spec: ExpertsSpec, gate_ups: Sequence[LinearMethod], downs: Sequence[LinearMethod]) -> None:
        super().__init__(spec, gate_ups, downs)
        self._parts: list[ExpertTensor] = []
        for part, methods in (("gate_up", self._gate_ups), ("down", self._downs)):
            first = methods[0]
            assert isinstance(first, Mxfp4Linear)
            stacked = [
                None if tensor is None else tensor.new_empty(len(methods), *tensor.shape)
                for tensor in (first.blocks, first.scales, first.bias)
            ]
            for index, method in enumerate(methods):
                views = [None if tensor is None else tensor[index] for tensor in stacked]
                method.blocks, method.scales, method.bias = views  # type: ignore[attr-defined]
            self._parts += [
                ExpertTensor(part=part, tensor=tensor)  # type: ignore[arg-type]
                for tensor in mxfp4_tensors(*stacked)  # type: ignore[arg-type]
            ]

    def tensors(self) -> list[ExpertTensor]:
        return self._parts


def empty_mxfp4(
    spec: LinearSpec | ExpertsSpec, outputs: int, inputs: int, has_bias: bool, *leading: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Blocks, scales and bias of a matrix, or with a leading dimension of experts. Raises ConfigError."""
    if inputs % GROUP:
        raise ConfigError(
            f"MXFP4 has a scale for each {GROUP} inputs, and a matrix of this rank has {inputs}; use fewer tensor "
            "parallel ranks, or --enable-expert-parallel"
        )
    shape = (*leading, outputs, inputs // GROUP)
    return (
        torch.empty(*shape, GROUP // 2, dtype=torch.uint8, device=spec.device),
        torch.empty(shape, dtype=torch.uint8, device=spec.device),
        torch.empty(*leading, outputs, dtype=spec.dtype, device=spec.device) if has_bias else None,
    )


def mxfp4_tensors(blocks: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> list[LinearTensor]:
    """As the loader takes them; all that is said is said without a leading dimension of experts."""
    found = [
        LinearTensor(suffix="blocks", data=blocks, out_dim=0, in_dim=1, in_unit=GROUP, fill=_random_bytes),
        LinearTensor(suffix="scales", data=scales, out_dim=0, in_dim=1, in_unit=GROUP, fill=_even_scales),
    ]
    if bias is not None:
        found.append(LinearTensor(suffix="bias", data=bias, out_dim=0, in_dim=None))
    return found


def _random_bytes(blocks: torch.Tensor, generator: torch.Generator) -> None:
    blocks.random_(0, 256, generator=generator)


def _even_scales(scales: torch.Tensor, _: torch.Generator) -> None:
    """About what keeps the size of activations."""
    scales.fill_(127 - round(math.log2(scales.shape[-1] * GROUP * _MEAN_SQUARE) / 2))


def check_scales(scales: torch.Tensor, names: Sequence[str]) -> None:
    """Raises ModelError for scales that no weight has: 255 is what is not a number."""
    largest = int(scales.max())
    if largest > LARGEST_EXPONENT:
        raise ModelError(
            f"{', '.join(names)}: the MXFP4 scales hold an exponent of {largest}, which no weight has "
            f"(at most {LARGEST_EXPONENT}); the checkpoint is damaged"
        )


@functools.cache
def _tables(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What a byte of blocks stands for, [256, 2], and one of scales, [256]."""
    values = torch.tensor(_MAGNITUDES + tuple(-value for value in _MAGNITUDES))
    byte = torch.arange(256)
    pairs = torch.stack([values[byte % 16], values[byte // 16]], dim=1)
    return pairs.to(device, dtype), torch.exp2(byte - 127.0).to(device, dtype)


def dequantize(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """blocks [N, K / 32, 16], scales [N, K / 32] -> [N, K]. bf16 and fp32 hold all of it exactly."""
    pairs, powers = _tables(dtype, blocks.device)
    # A pair of 16-bit numbers is gathered as one of 32.
    whole = pairs.view(torch.int32 if dtype.itemsize == 2 else torch.int64).view(-1)
    values = whole.index_select(0, blocks.flatten().int()).view(dtype).view(*scales.shape, GROUP)
    return values.mul_(powers.index_select(0, scales.flatten().int()).view(*scales.shape, 1)).flatten(1)
