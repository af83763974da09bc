"""Products with weights of one byte on a CPU: they are converted block by block, and the rows stay as they are.

So a product is that of the dequantized weight, whatever a checkpoint says of its activations: quantizing them would
save nothing here. T rows, N outputs, K inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from shoal.quantization.base import LinearSpec, NormWeights
from shoal.quantization.byte_linear import ByteWeight
from shoal.quantization.unquantized import ROW_TILE

# Elements that are converted at a time: what a core's L2 holds of fp32.
_CONVERTED = 1 << 18
# Up to so many rows PyTorch's product of bf16 with INT8 is faster than converting: 0.55, 1.1, 4.1 ms for 1, 4, 16 rows
# of 4096 x 4096, where bf16 weights take 1.3, 1.3, 1.6 and converting them 1.9 (2 cores with AVX-512, 2026-11).
_FEW_INT8_ROWS = 4
# Up to so many rows a product in fp32 of what was just converted costs less than converting it further, to bf16.
_FEW_ROWS = 8
# An FP8 number's bits, as the upper bits of an fp16, are its value by this.
_FP8_AS_FP16 = 2.0**-8


class _Room:
    """Where a block is converted, one after the other: memory that is asked for anew costs more than converting."""

    def __init__(self, step: int, num_inputs: int, dtype: torch.dtype) -> None:
        self.bits = torch.empty(step, num_inputs, dtype=torch.int16)
        self.values = torch.empty(step, num_inputs)
        self.rounded = self.values if dtype is torch.float32 else torch.empty(step, num_inputs, dtype=dtype)


class DequantizedProduct:
    """x W^T + b in fp32, or in bf16 where the model is and rows are many. FP8 numbers are taken by _FP8_AS_FP16, and
    their scales are larger by that."""

    fused_rows = 0

    def __init__(self, spec: LinearSpec, weight: ByteWeight, bias: torch.Tensor | None) -> None:
        self.spec, self.bias = spec, bias
        self.numbers, self.scales, self.block = weight.numbers, weight.scales, weight.block
        if weight.numbers.dtype is torch.float8_e4m3fn:
            self.scales = self.scales / _FP8_AS_FP16
        step = max(1, _CONVERTED // max(1, spec.in_features))
        self.step = max(ROW_TILE, step // ROW_TILE * ROW_TILE)
        # PyTorch's product reads beyond the end of rows that are no multiple of 16 (2.13: wrong results, or a crash).
        whole = weight.block is None and spec.in_features % 16 == 0
        self._packs = whole and weight.numbers.dtype is torch.int8 and spec.dtype is torch.bfloat16
        self._ones = torch.ones(spec.out_features, dtype=spec.dtype) if self._packs else None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        spec, num_rows = self.spec, x.shape[0]
        if self._packs and num_rows <= _FEW_INT8_ROWS:
            # Multiplied by the scales in bf16 it would lose what the scales have beyond 8 bits.
            output = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.numbers, self._ones).float()
        else:
            dtype = torch.bfloat16 if spec.dtype is torch.bfloat16 and num_rows > _FEW_ROWS else torch.float32
            own = x.to(dtype)
            output = torch.empty(num_rows, spec.out_features)
            room = _Room(self.step, spec.in_features, dtype)
            for start in range(0, spec.out_features, self.step):
                output[:, start : start + self.step] = F.linear(own, self._rows(start, dtype, room))
        if self.block is None:
            output.mul_(self.scales)
        return self._rounded(output)

    def apply_gated(self, x: torch.Tensor, *, norm: NormWeights | None = None) -> torch.Tensor | None:
        return None

    def _rounded(self, output: torch.Tensor) -> torch.Tensor:
        """output [T, N] fp32 -> with the bias, in the model's dtype."""
        if self.bias is not None:
            output.add_(self.bias)
        return output.to(self.spec.dtype)

    def _rows(self, start: int, dtype: torch.dtype, room: _Room) -> torch.Tensor:
        """Of `step` outputs from `start` on: the numbers by the blocks' scales, not by the outputs'. Lies in `room`."""
        numbers = self.numbers[start : start + self.step]
        count = numbers.shape[0]
        if numbers.dtype is torch.int8 and self.block is None:
            return room.rounded[:count].copy_(numbers)
        values = room.values[:count]
        if numbers.dtype is torch.int8:
            values.copy_(numbers)
        else:
            # PyTorch converts FP8 ten times as slowly (4096 x 4096: 43 ms against 4, 2 cores, 2026-11).
            bits = room.bits[:count].copy_(numbers.view(torch.int8))
            bits.bitwise_left_shift_(7).bitwise_and_(-0x4080)
            values.copy_(bits.view(torch.float16))
        if self.block is not None:
            scales = self._block_scales(start, count)
            whole = values.shape[1] // self.block[1]
            inside = values[:, : whole * self.block[1]]
            inside.unflatten(1, (whole, self.block[1])).mul_(scales[:, :whole].unsqueeze(2))
            if whole < scales.shape[1]:
                values[:, whole * self.block[1] :].mul_(scales[:, whole:])
        return values if dtype is torch.float32 else room.rounded[:count].copy_(values)

    def _block_scales(self, start: int, count: int) -> torch.Tensor:
        """[count, K / block]."""
        assert self.block is not None
        if self.block[0] == 1:
            return self.scales[start : start + count]
        return self.scales[torch.arange(start, start + count) // self.block[0]]


class TiledProduct(DequantizedProduct):
    """Deterministic mode: as `unquantized.TiledLinear`, products of exactly ROW_TILE rows and a fixed tree over the
    shards of the inputs, summed in fp32."""

    _one = torch.ones(1)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        spec, num_rows, num_shards = self.spec, x.shape[0], self.spec.num_input_shards
        dtype = torch.bfloat16 if spec.dtype is torch.bfloat16 else torch.float32
        padded = F.pad(x.to(dtype), (0, 0, 0, -num_rows % ROW_TILE))
        tiles = [[piece.contiguous() for piece in tile.chunk(num_shards, dim=1)] for tile in padded.split(ROW_TILE)]
        output = torch.empty(padded.shape[0], spec.out_features)
        room = _Room(self.step, spec.in_features, dtype)
        for start in range(0, spec.out_features, self.step):
            shards = [shard.contiguous() for shard in self._rows(start, dtype, room).chunk(num_shards, dim=1)]
            scales = self.scales[start : start + self.step] if self.block is None else self._one
            for index, pieces in enumerate(tiles):
                # Each is scaled by itself, as it is where other ranks have the others.
                sums = [
                    F.linear(piece, shard).float().mul_(scales) for piece, shard in zip(pieces, shards, strict=True)
                ]
                while len(sums) > 1:
                    sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
                output[index * ROW_TILE : (index + 1) * ROW_TILE, start : start + self.step] = sums[0]
        output = output[:num_rows]
        return output if spec.is_summand else self._rounded(output)


def create_product(spec: LinearSpec, weight: ByteWeight, bias: torch.Tensor | None) -> DequantizedProduct:
    return (TiledProduct if spec.deterministic else DequantizedProduct)(spec, weight, bias)
