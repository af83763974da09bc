"""Products with integers in groups on a CPU, or on a device without kernels: see packed_int.py.

Outputs lie in blocks of 64 (32 where PyTorch's own packed product has them so): 4-bit integers [blocks, K, 32], a byte
holds outputs b and 32 + b; more bits [blocks, K, 64]. T rows, N outputs, K inputs.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from shoal.quantization.base import LinearSpec, NormWeights
from shoal.quantization.packed_int import IntegerMatrix, exact_scales
from shoal.quantization.unquantized import ROW_TILE

# Up to so many rows PyTorch's packed product is faster. One core with AVX-512, 2048 x 2048 in bf16, 2026-11: 0.31 ms
# for one row and 0.61 for 4 where the plain weight takes 0.99 and 0.91; 4.0 for 16 rows, where the plain one takes 1.0.
# In fp32 it takes 15 times as long as the plain product.
_FEW_ROWS = 8
_PACKED_GROUPS = (32, 64, 128, 256)


class BlockProduct:
    """x W^T + b. Rows are many: a block is dequantized and multiplied after the other, in fp32, or in bf16 or fp16
    where the layer is. Few rows of bf16: PyTorch's packed product, on the same integers."""

    fused_rows = 0

    def __init__(self, spec: LinearSpec, matrix: IntegerMatrix, bias: torch.Tensor | None) -> None:
        self.dtype, self.bias, self.order = spec.dtype, bias, matrix.order
        self.num_outputs, self.num_inputs, self.group_size = matrix.num_outputs, matrix.num_inputs, matrix.group_size
        self.is_nibbles = matrix.bits <= 4
        outputs, size = packed_block() or 64, matrix.num_inputs
        num_blocks = -(-matrix.num_outputs // outputs)
        width = outputs // 2 if self.is_nibbles else outputs
        device = matrix.scales.device
        self.integers = torch.zeros(num_blocks, size, width, dtype=torch.uint8, device=device)
        for own in matrix.pieces():  # multiples of 64
            integers = F.pad(matrix.read(own), (0, 0, 0, -(own.stop - own.start) % outputs))
            blocks = integers.view(-1, outputs, size).transpose(1, 2)
            if self.is_nibbles:
                blocks = blocks[..., :width] | (blocks[..., width:] << 4)
            self.integers[own.start // outputs :][: blocks.shape[0]] = blocks
        pad = (0, num_blocks * outputs - matrix.num_outputs)
        # [blocks, groups, 1, outputs]
        self.scales = exact_scales(F.pad(matrix.scales, pad)).view(-1, num_blocks, 1, outputs).transpose(0, 1)
        self.scales = self.scales.contiguous()
        self.zeros: torch.Tensor | None = None
        self.middle = 1 << (matrix.bits - 1)
        if matrix.zeros is not None:
            self.zeros = F.pad(matrix.zeros, pad).view(-1, num_blocks, 1, outputs).transpose(0, 1).contiguous()
        self._packed_scales: torch.Tensor | None = None
        if self._packs(matrix):
            self._packed_scales = self._scales_and_zeros()

    @property
    def weight_bytes(self) -> int:
        tensors = (self.integers, self.scales, self.zeros, self._packed_scales)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        if self.order is not None:
            x = x.index_select(1, self.order)
        if self._packed_scales is not None and x.shape[0] <= _FEW_ROWS:
            output = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.contiguous(), self.integers.view(-1, self.num_inputs // 2), self.group_size, self._packed_scales
            )[:, : self.num_outputs]
        else:
            output = self.multiply([x], self.dtype)[0]
        return output if self.bias is None else output + self.bias

    def apply_gated(self, x: torch.Tensor, *, norm: NormWeights | None = None) -> torch.Tensor | None:
        return None

    def multiply(self, rows: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        """Each of `rows` [T, K], already in order, times the weight, in dtype: [T, N], without bias."""
        pieces = [each.to(dtype) for each in rows]
        blocks: list[list[torch.Tensor]] = [[] for _ in rows]
        for index in range(self.integers.shape[0]):
            weight = self.block(index, dtype)
            for piece, found in zip(pieces, blocks, strict=True):
                found.append(piece @ weight)
        return [torch.cat(found, dim=1)[:, : self.num_outputs] for found in blocks]

    def block(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """The weights of a block's outputs, [K, outputs], rounded to dtype once at the end."""
        stored = self.integers[index]
        size, outputs = self.num_inputs, self.scales.shape[-1]
        work = torch.empty(size, outputs, device=stored.device)
        if self.is_nibbles:
            work[:, : outputs // 2] = stored & 15
            work[:, outputs // 2 :] = stored >> 4
        else:
            work.copy_(stored)
        scales = self.scales[index].float()
        zeros = self.middle if self.zeros is None else self.zeros[index].float()
        if size % self.group_size == 0:
            work.view(-1, self.group_size, outputs).sub_(zeros).mul_(scales)
        else:
            groups = torch.arange(size, device=stored.device) // self.group_size
            work.sub_(zeros if isinstance(zeros, int) else zeros[groups, 0]).mul_(scales[groups, 0])
        return work.to(dtype)

    def _packs(self, matrix: IntegerMatrix) -> bool:
        if matrix.scales.device.type != "cpu" or self.dtype is not torch.bfloat16 or not self.is_nibbles:
            return False
        return (
            packed_block() is not None
            and self.group_size in _PACKED_GROUPS
            and self.num_inputs % self.group_size == 0
            and self.num_inputs % 32 == 0
        )

    def _scales_and_zeros(self) -> torch.Tensor:
        """As PyTorch takes them, bf16 [groups, N, 2]: the weight is (integer - 8) * scale + zero."""
        scales = self.scales.float().transpose(0, 1).flatten(1)
        zeros = torch.full_like(scales, self.middle)
        if self.zeros is not None:
            zeros = self.zeros.float().transpose(0, 1).flatten(1)
        return torch.stack([scales, (8 - zeros) * scales], dim=-1).to(torch.bfloat16).contiguous()


class FixedBlockProduct:
    """Deterministic mode: a row's result depends on nothing but the row. Products of exactly ROW_TILE rows and whole
    blocks in fp32, and for row-parallel layers a fixed tree over the shards of the inputs, whoever holds them."""

    fused_rows = 0

    def __init__(self, spec: LinearSpec, matrix: IntegerMatrix, bias: torch.Tensor | None) -> None:
        self.spec, self.bias = spec, bias
        size = spec.in_features // spec.num_input_shards
        shards = [slice(start, start + size) for start in range(0, spec.in_features, size)]
        parts = [matrix.arranged()] if len(shards) == 1 else [matrix.inputs(own) for own in shards]
        self.shards, self.products = shards, [BlockProduct(spec, part, None) for part in parts]

    @property
    def weight_bytes(self) -> int:
        return sum(product.weight_bytes for product in self.products)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -num_rows % ROW_TILE))
        sums = []
        for own, product in zip(self.shards, self.products, strict=True):
            rows = padded[:, own]
            if product.order is not None:
                rows = rows.index_select(1, product.order)
            tiles = [tile.contiguous() for tile in rows.split(ROW_TILE)]
            sums.append(torch.cat(product.multiply(tiles, torch.float32))[:num_rows])
        while len(sums) > 1:
            sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=True)]
        if self.spec.is_summand:
            return sums[0]
        total = sums[0] if self.bias is None else sums[0] + self.bias
        return total.to(self.spec.dtype)

    def apply_gated(self, x: torch.Tensor, *, norm: NormWeights | None = None) -> torch.Tensor | None:
        return None


@functools.cache
def packed_block() -> int | None:
    """How many outputs PyTorch's packed product has in a block, if it lays them out as here; None: it does not."""
    if not hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
        return None
    integers = torch.randint(0, 16, (128, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1).flatten()
    for outputs in (64, 32):
        halves = integers.view(-1, 2, outputs // 2, 32).transpose(2, 3)
        if torch.equal((halves[:, 0] | halves[:, 1] << 4).to(torch.uint8).flatten(), theirs):
            return outputs
    return None


def create_product(
    spec: LinearSpec, matrix: IntegerMatrix, bias: torch.Tensor | None
) -> BlockProduct | FixedBlockProduct:
    if spec.deterministic:
        return FixedBlockProduct(spec, matrix, bias)
    return BlockProduct(spec, matrix.arranged(), bias)
