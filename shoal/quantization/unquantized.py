"""Linear layers with plain weights: F.linear, oneDNN's packed form on CPU, and fixed tiles in deterministic mode.

T rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from shoal.quantization.base import LinearMethod, LinearSpec, LinearTensor, QuantizationScheme

# Deterministic mode: every product has exactly this many rows, so the kernel is always the same one.
ROW_TILE = 16


class Unquantized(QuantizationScheme):
    """Weights as they are in the checkpoint."""

    name = "none"

    def linear(self, spec: LinearSpec, weight: torch.Tensor | None = None) -> LinearMethod:
        if spec.deterministic:
            return TiledLinear(spec, weight)
        if packing_works(spec):
            return PackedLinear(spec, weight)
        return PlainLinear(spec, weight)


def packing_works(spec: LinearSpec) -> bool:
    """Whether oneDNN can hold these weights in the blocked layout of its kernels."""
    if spec.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return spec.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PlainLinear(LinearMethod):
    """F.linear."""

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
        return None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def weight_bytes(self) -> int:
        weights = 0 if self._tied else self.spec.out_features * self.spec.in_features
        return (weights + (self.spec.out_features if self.spec.bias else 0)) * self.spec.dtype.itemsize


class PackedLinear(PlainLinear):
    """Weights in oneDNN's blocked layout. At few rows they stream from memory about twice as fast as F.linear's, at many
    rows they are no slower (2 cores with AVX-512 bf16: 22-28 GB/s against 13-18 at 1 to 8 rows, 5 % less time at 2048)."""

    def process_after_load(self) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)
        del self.weight

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return output

    def weight_bytes(self) -> int:
        own = super().weight_bytes()
        return own + self.spec.out_features * self.spec.in_features * self.spec.dtype.itemsize if self._tied else own


class TiledLinear(PlainLinear):
    """A row's result depends on nothing but the row: products of exactly ROW_TILE rows, and for row-parallel layers a
    fixed tree over the shards of the inputs, the same whichever rank holds them."""

    def process_after_load(self) -> None:
        num_shards = self.spec.num_input_shards
        self._shards = [shard.contiguous() for shard in self.weight.chunk(num_shards, dim=1)] if num_shards > 1 else [self.weight]
        if not self._tied:
            del self.weight

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -num_rows % ROW_TILE))
        tiles = [self._apply_tile(padded[start : start + ROW_TILE]) for start in range(0, padded.shape[0], ROW_TILE)]
        output = tiles[0] if len(tiles) == 1 else torch.cat(tiles)
        return output[:num_rows]

    def _apply_tile(self, tile: torch.Tensor) -> torch.Tensor:
        if len(self._shards) == 1:
            return F.linear(tile, self._shards[0], self.bias)
        pieces = tile.chunk(len(self._shards), dim=1)
        sums = [F.linear(piece.contiguous(), shard).float() for piece, shard in zip(pieces, self._shards, strict=True)]
        while len(sums) > 1:
            sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
        total = sums[0] if self.bias is None else sums[0] + self.bias
        return total.to(self.spec.dtype)
