"""Products with weights of one byte on a CUDA device.

Up to 16 rows stay as they are, and the weight is converted in registers (kernels/linear.py): the time is that of
reading it. More rows are quantized, each by itself, where the checkpoint says so and the GPU has matrix units for it:
FP8 from sm_89 on, by cuBLAS with a scale for each row and output, by our kernel with blocks; INT8 by our kernel. Else
the weight is dequantized for each product. T rows, N outputs, K inputs.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F

from shoal.kernels.support import has_kernels
from shoal.log import get_logger, warn_once
from shoal.quantization.base import LinearSpec, NormWeights
from shoal.quantization.byte_linear import ByteWeight

_logger = get_logger(__name__)


class PlainProduct:
    """Without Triton: PyTorch's operations, and the dequantized weight for each product."""

    fused_rows = 0

    def __init__(self, spec: LinearSpec, weight: ByteWeight, bias: torch.Tensor | None) -> None:
        self.spec, self.weight, self.bias = spec, weight, bias

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._dequantized(), self.bias)

    def apply_gated(self, x: torch.Tensor, *, norm: NormWeights | None = None) -> torch.Tensor | None:
        return None

    def _dequantized(self) -> torch.Tensor:
        scales, block = self.weight.scales, self.weight.block
        num_outputs, num_inputs = self.weight.numbers.shape
        if block is None:
            scales = scales.unsqueeze(1)
        else:
            scales = scales.repeat_interleave(block[0], 0)[:num_outputs].repeat_interleave(block[1], 1)[:, :num_inputs]
        return (self.weight.numbers.float() * scales).to(self.spec.dtype)


class DequantizingProduct(PlainProduct):
    """The same with our kernel; in deterministic mode the product is one whose bits depend on the row alone."""

    def __init__(self, spec: LinearSpec, weight: ByteWeight, bias: torch.Tensor | None) -> None:
        super().__init__(spec, weight, bias)
        kernels = importlib.import_module("shoal.kernels.linear")
        self._kernels = importlib.import_module("shoal.kernels.byte_matmul")
        numbers, values = weight.numbers, weight.scales
        if numbers.dtype is torch.float8_e4m3fn and not kernels.converts_fp8(numbers.device):
            numbers, values = numbers.view(torch.uint8), values / kernels.FP8_AS_FP16
        # As the kernels take them.
        self._numbers, self._scales = numbers, kernels.ByteScales(values, weight.block)
        self._multiply: Any = F.linear
        if spec.deterministic:
            self._multiply = importlib.import_module("shoal.kernels.fixed_matmul").fixed_matmul

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self._multiply(x, self._dequantized(), self.bias)
        return output

    def _dequantized(self) -> torch.Tensor:
        weight: torch.Tensor = self._kernels.dequantize(self._numbers, self._scales, self.spec.dtype)
        return weight


class ByteProduct(DequantizingProduct):
    """By the number of rows: few, as `plan` says; more quantized, or by the dequantized weight."""

    def __init__(self, spec: LinearSpec, weight: ByteWeight, bias: torch.Tensor | None) -> None:
        super().__init__(spec, weight, bias)
        self._many = self._way_for_many()
        chooser = importlib.import_module("shoal.kernels.tuning").linear_chooser(spec.device)
        # All ranks of a replicated layer must multiply alike: none measures.
        self.plan = chooser.plan(
            self._numbers, bias, self._scales, spec.dtype, self._many, measures=not spec.is_replicated
        )
        self.fused_rows = 0 if self.plan is None else self.plan.fused_rows

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self._many(x) if self.plan is None else self.plan.apply(x)
        return output

    def apply_gated(self, x: torch.Tensor, *, norm: NormWeights | None = None) -> torch.Tensor | None:
        return None if self.plan is None else self.plan.apply_gated(x, norm=norm)

    def apply_fused(
        self, x: torch.Tensor, *, norm: NormWeights | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert self.plan is not None
        output: torch.Tensor = self.plan.apply(x, norm=norm, residual=residual)
        return output

    def _way_for_many(self) -> Any:
        weight = self.weight
        num_outputs, num_inputs = weight.numbers.shape
        if weight.activations == "none" or num_outputs % 16 or num_inputs % 16:
            return super().apply
        if weight.numbers.dtype is torch.float8_e4m3fn:
            if self._numbers.dtype is torch.uint8:
                warn_once(
                    _logger,
                    f"{torch.cuda.get_device_name(self.spec.device)} has no matrix units for FP8 (from sm_89 on): "
                    "products are those of the dequantized weights, which saves memory, and time with few rows",
                )
                return super().apply
            if weight.block is None:
                return self._by_library
        if weight.block is not None and weight.block[1] % 32:  # a part of the sum ends with a block
            return super().apply
        return self._by_kernel

    def _by_library(self, x: torch.Tensor) -> torch.Tensor:
        """A scale for each row and each output; cuBLAS."""
        q, scales = self._kernels.quantize_rows(x, torch.float8_e4m3fn, scale=self.weight.input_scale)
        if self.weight.input_scale is not None:
            scales = scales.expand(x.shape[0]).unsqueeze(1).contiguous()
        output = torch._scaled_mm(
            q,
            self.weight.numbers.t(),
            scale_a=scales,
            scale_b=self.weight.scales.unsqueeze(0),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        if self.bias is not None:
            output = output + self.bias
        return output.to(self.spec.dtype)

    def _by_kernel(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        group = 0 if weight.block is None or weight.activations != "dynamic_group" else weight.block[1]
        q, scales = self._kernels.quantize_rows(x, weight.numbers.dtype, group=group, scale=weight.input_scale)
        output: torch.Tensor = self._kernels.byte_matmul(
            q, scales, weight.numbers, self._scales, self.bias, self.spec.dtype
        )
        return output


def create_product(spec: LinearSpec, weight: ByteWeight, bias: torch.Tensor | None) -> PlainProduct:
    if not has_kernels(spec.device):
        return PlainProduct(spec, weight, bias)
    if spec.deterministic or spec.dtype is torch.float32:
        return DequantizingProduct(spec, weight, bias)
    return ByteProduct(spec, weight, bias)
