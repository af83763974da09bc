"""Linear layers with plain weights: F.linear or oneDNN's packed form, and fixed tiles of rows in deterministic mode.

T rows, K inputs, N outputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from shoal.kernels.support import has_kernels
from shoal.quantization.base import (
    ExpertsMethod,
    ExpertsSpec,
    LinearMethod,
    LinearSpec,
    LinearTensor,
    NormWeights,
    QuantizationScheme,
)

# Deterministic mode: every product has exactly this many rows, so that it always is the same computation.
ROW_TILE = 16
# Below this many inputs a product in fp32 takes less time than oneDNN's call (about 13 µs).
_FEWEST_PACKED_FP32_INPUTS = 256


class Unquantized(QuantizationScheme):
    """Weights as they are in the checkpoint."""

    name = "none"

    def linear(self, spec: LinearSpec, weight: torch.Tensor | None = None) -> LinearMethod:
        if not spec.deterministic:
            return UnquantizedLinear(spec, weight)
        if spec.device.type == "cuda":  # with the kernels: the attention backend has refused a GPU without
            return importlib.import_module("shoal.quantization.fixed_linear").FixedLinear(spec, weight)
        return TiledLinear(spec, weight)

    def experts(self, spec: ExpertsSpec) -> ExpertsMethod | None:
        if not has_kernels(spec.device):
            return None
        method: ExpertsMethod = importlib.import_module("shoal.quantization.stacked_experts").StackedExperts(spec)
        return method


class UnquantizedLinear(LinearMethod):
    """x W^T + b. After loading the weights are packed where that is faster; the plain copy goes, unless it is tied."""

    _plan: Any = None

    def __init__(self, spec: LinearSpec, weight: torch.Tensor | None = None) -> None:
        self.spec = spec
        self._tied = weight is not None
        shape = (spec.out_features, spec.in_features)
        self.weight = torch.empty(shape, dtype=spec.dtype, device=spec.device) if weight is None else weight
        self.bias = torch.empty(spec.out_features, dtype=spec.dtype, device=spec.device) if spec.bias else None

    def tensors(self) -> list[LinearTensor]:
        found = [] if self._tied else [LinearTensor(suffix="weight", data=self.weight, out_dim=0, in_dim=1)]
        if self.bias is not None:
            found.append(LinearTensor(suffix="bias", data=self.bias, out_dim=0, in_dim=None))
        return found

    def process_after_load(self) -> None:
        # What chooses by the number of rows between the kernels for few of them and cuBLAS.
        self._plan = None if self.spec.is_replicated else _plan(self.weight, self.bias)
        self._multiply = self._plan.apply if self._plan is not None else _product(self.weight, self.bias)
        self.fused_rows = 0 if self._plan is None or self.spec.is_summand else self._plan.fused_rows
        del self.weight

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(x)

    def dense_weight(self) -> torch.Tensor:
        weight = self.weight
        del self.weight
        return weight

    def apply_gated(self, x: torch.Tensor, *, norm: NormWeights | None = None) -> torch.Tensor | None:
        return None if self._plan is None else self._plan.apply_gated(x, norm=norm)

    def apply_fused(
        self, x: torch.Tensor, *, norm: NormWeights | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._plan.apply(x, norm=norm, residual=residual)

    def weight_bytes(self) -> int:
        spec = self.spec
        shared = self._tied and not packing_pays(spec.dtype, spec.device, spec.in_features)
        num_weights = 0 if shared else spec.out_features * spec.in_features
        return (num_weights + (spec.out_features if spec.bias else 0)) * spec.dtype.itemsize


class TiledLinear(UnquantizedLinear):
    """A row's result depends on nothing but the row: products of exactly ROW_TILE rows, and for row-parallel layers a
    fixed tree over the shards of the inputs, summed in fp32, the same whichever rank holds them."""

    def process_after_load(self) -> None:
        shards = [shard.contiguous() for shard in self.weight.chunk(self.spec.num_input_shards, dim=1)]
        self._multiply_shards = [_product(shard, self.bias if len(shards) == 1 else None) for shard in shards]
        del self.weight

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        num_rows, num_shards = x.shape[0], len(self._multiply_shards)
        padded = F.pad(x, (0, 0, 0, -num_rows % ROW_TILE))
        if num_shards == 1:
            product = _by_tiles(self._multiply_shards[0], padded)[:num_rows]
            return product.float() if self.spec.is_summand else product
        pieces = padded.view(padded.shape[0], num_shards, -1).transpose(0, 1).contiguous()
        sums = [
            _by_tiles(multiply, piece).float() for multiply, piece in zip(self._multiply_shards, pieces, strict=True)
        ]
        while len(sums) > 1:
            sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
        if self.spec.is_summand:
            return sums[0][:num_rows]
        total = sums[0] if self.bias is None else sums[0] + self.bias
        return total[:num_rows].to(self.spec.dtype)


def _plan(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """A `kernels.tuning.LinearPlan` for this weight [N, K]; None where there are no kernels for it."""
    if not has_kernels(weight.device):
        return None
    return importlib.import_module("shoal.kernels.tuning").linear_chooser(weight.device).plan(weight, bias)


Product = Callable[[torch.Tensor], torch.Tensor]


def _by_tiles(multiply: Product, x: torch.Tensor) -> torch.Tensor:
    """x [T, K], T a multiple of ROW_TILE -> [T, N]."""
    tiles = [multiply(tile) for tile in x.split(ROW_TILE)]
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles)


def _product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """What multiplies x [T, K] by weight [N, K]. It holds the packed form alone, or the weight as it is."""
    if not packing_pays(weight.dtype, weight.device, weight.shape[1]):
        return partial(F.linear, weight=weight, bias=bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return partial(_multiply_packed, packed, bias)


def _multiply_packed(packed: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return output


def packing_pays(dtype: torch.dtype, device: torch.device, in_features: int) -> bool:
    """Whether oneDNN's blocked layout is there and faster than F.linear. It depends on the inputs, never on the
    outputs, which tensor parallelism splits: another kernel would mean other bits.

    2 cores with AVX-512 bf16, weights from memory, 2026-11. bf16: 22-28 GB/s against 12-18 at 1 to 8 rows, 5 % less
    time at 2048 rows. fp32: half the time at 4 to 16 rows, 10-20 % less at 1 and at 512.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32 and in_features >= _FEWEST_PACKED_FP32_INPUTS
