"""Products with integers in groups on a CUDA device: see packed_int.py and kernels/packed_weight.py.

T rows, N outputs, K inputs.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
import torch.nn.functional as F

from shoal.kernels.support import has_kernels
from shoal.quantization.base import LinearSpec, NormWeights
from shoal.quantization.packed_cpu import BlockProduct
from shoal.quantization.packed_int import IntegerMatrix, exact_scales


class KernelProduct:
    """By the number of rows, as `plan` says. Inputs that are ordered are put in order first."""

    def __init__(self, spec: LinearSpec, matrix: IntegerMatrix, bias: torch.Tensor | None) -> None:
        self.order = matrix.order
        self.weight = packed_weight(matrix)
        chooser = importlib.import_module("shoal.kernels.packed_tuning").packed_chooser(spec.device)
        self.plan = chooser.plan(self.weight, bias, spec.dtype, measures=not spec.is_replicated)
        self.fused_rows = 0 if self.order is not None else importlib.import_module(chooser.__module__).FUSED_ROWS

    @property
    def weight_bytes(self) -> int:
        return int(self.weight.nbytes) + (0 if self.order is None else self.order.nbytes)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.plan.apply(self._in_order(x))
        return output

    def apply_gated(self, x: torch.Tensor, *, norm: NormWeights | None = None) -> torch.Tensor | None:
        output: torch.Tensor = self.plan.apply_gated(self._in_order(x), norm=norm)
        return output

    def apply_fused(
        self, x: torch.Tensor, *, norm: NormWeights | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        output: torch.Tensor = self.plan.apply(x, norm=norm, residual=residual)
        return output

    def _in_order(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.order is None else x.index_select(1, self.order)


class DequantizingProduct:
    """Every product with the dequantized weight, some outputs at a time: in fp32, and in deterministic mode by the
    product whose bits depend on the row alone."""

    fused_rows = 0

    def __init__(self, spec: LinearSpec, matrix: IntegerMatrix, bias: torch.Tensor | None) -> None:
        self.spec, self.bias, self.order = spec, bias, matrix.order
        self.weight = packed_weight(matrix)
        self._kernels = importlib.import_module("shoal.kernels.packed_weight")
        self._step = importlib.import_module("shoal.kernels.packed_tuning").outputs_at_a_time(self.weight, spec.dtype)

    @property
    def weight_bytes(self) -> int:
        return int(self.weight.nbytes) + (0 if self.order is None else self.order.nbytes)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        if self.order is not None:
            x = x.index_select(1, self.order)
        num_outputs = self.weight.num_outputs
        outputs = []
        for start in range(0, num_outputs, self._step):
            own = slice(start, min(start + self._step, num_outputs))
            count = own.stop - own.start
            piece = torch.empty(count, self.weight.num_inputs, dtype=self.spec.dtype, device=x.device)
            self._kernels.dequantize_packed(self.weight, own, piece)
            outputs.append(self._multiply(x, piece, None if self.bias is None else self.bias[own]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _multiply(self, x: torch.Tensor, piece: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not self.spec.deterministic:
            return F.linear(x, piece, bias)
        output: torch.Tensor = importlib.import_module("shoal.kernels.fixed_matmul").fixed_matmul(x, piece, bias)
        return output

    def apply_gated(self, x: torch.Tensor, *, norm: NormWeights | None = None) -> torch.Tensor | None:
        return None


def packed_weight(matrix: IntegerMatrix) -> Any:
    """A `kernels.packed_weight.PackedWeight` of a matrix that is arranged: 2 and 3 bits take 4, inputs are filled up to
    whole slabs, and groups that fit no slab are cut into some that do."""
    kernels = importlib.import_module("shoal.kernels.packed_weight")
    bits, size = 4 if matrix.bits <= 4 else 8, matrix.group_size
    slab = kernels.slab_inputs(bits)
    num_slabs = -(-matrix.num_inputs // slab)
    whole = num_slabs * slab
    scales, zeros = matrix.scales, matrix.zeros
    if scales.shape[0] == 1:
        size = whole
    elif slab % size and size % slab:
        cut = math.gcd(size, slab)
        scales = scales.repeat_interleave(size // cut, 0)
        zeros = None if zeros is None else zeros.repeat_interleave(size // cut, 0)
        size = cut
    if zeros is None and matrix.bits != bits:
        zeros = torch.full(scales.shape, 1 << (matrix.bits - 1), dtype=torch.uint8, device=scales.device)
    num_groups = -(-whole // size)
    scales = _with_rows(scales, num_groups)
    zeros = None if zeros is None else _with_rows(zeros, num_groups)
    words = torch.empty(num_slabs, matrix.num_outputs, kernels.WORDS, dtype=torch.int32, device=scales.device)
    for own in matrix.pieces():
        words[:, own] = kernels.pack_words(F.pad(matrix.read(own), (0, whole - matrix.num_inputs)), bits)
    return kernels.PackedWeight(words, exact_scales(scales), zeros, bits, size, matrix.num_inputs)


def _with_rows(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """[G, N] -> [count, N], with zeros or without what nothing needs."""
    return F.pad(tensor, (0, 0, 0, max(0, count - tensor.shape[0])))[:count].contiguous()


def create_product(
    spec: LinearSpec, matrix: IntegerMatrix, bias: torch.Tensor | None
) -> KernelProduct | DequantizingProduct | BlockProduct:
    matrix = matrix.arranged()
    if matrix.group_size % 16 and matrix.scales.shape[0] > 1:  # 8, 24, 40
        matrix = matrix.filled_up()
    if not has_kernels(spec.device):
        return BlockProduct(spec, matrix, bias)
    if spec.deterministic or spec.dtype is torch.float32:
        return DequantizingProduct(spec, matrix, bias)
    return KernelProduct(spec, matrix, bias)
