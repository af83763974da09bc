"""Products of tokens with experts in MXFP4, which are dequantized in registers: what kernels/moe.py is for plain ones,
and cut like it. Called by quantization/mxfp4_cuda.py, whose reference is `quantization.mxfp4.dequantize`.

T tokens, k experts a token, P = T * k pairs, E experts, K inputs, N outputs of a product (of the gated one its gates).
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoal.kernels.expert_weights import ExpertRows, GroupedTiles, Tiles
from shoal.kernels.launch import has_dependent_launch, launch_options
from shoal.kernels.moe import activate, finish_block, pairs_of_block
from shoal.kernels.moe_routing import PairOrder

# Outputs of a program for few tokens, inputs at once.
_FEW_CUT = (4, 1024)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mxfp4Weight(ExpertRows):
    """blocks uint8 [E, rows, K / 2], scales uint8 [E, rows, K / 32]."""

    blocks: torch.Tensor
    scales: torch.Tensor

    @property
    def num_inputs(self) -> int:
        return 2 * self.blocks.shape[2]

    @property
    def num_experts(self) -> int:
        return self.blocks.shape[0]

    @property
    def num_rows(self) -> int:
        return self.blocks.shape[1]

    def tiles(self, dtype: torch.dtype) -> Tiles:
        # So much of a weight in fp32 is what registers hold.
        size = 32 if dtype is torch.float32 else 64
        cuts = ((12, 16), (24, 32), (float("inf"), 64))
        return tuple((most, GroupedTiles(block_m, size, size, num_warps=4, num_stages=2)) for most, block_m in cuts)


@triton.jit
def _value(code):
    """uint16 e2m1 codes of four bits -> fp32, 2^14 too small: their bits are those of an fp16 whose exponent is so much
    smaller, also of 0.5, which is subnormal in both."""
    bits = ((code & 7) << 9) | ((code & 8) << 12)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _power(scale):
    """uint8 exponents, 127 too large -> fp32 powers of two times 2^14; up to 240."""
    return ((scale.to(tl.int32) + 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _half_tiles(byte, scale):
    """byte uint8 [R, C / 2], scale uint8 [R, C / 32] -> the even and the odd numbers, fp32 [R, C / 2] each."""
    R: tl.constexpr = byte.shape[0]
    HALF: tl.constexpr = byte.shape[1]
    power = tl.reshape(tl.broadcast_to(_power(scale)[:, :, None], (R, HALF // 16, 16)), (R, HALF))
    code = byte.to(tl.uint16)
    return _value(code & 15) * power, _value(code >> 4) * power


@triton.jit
def _dots(blocks, scales, x_row, row, start, K, here, BLOCK_K: tl.constexpr):
    """fp32 [R]: rows of a weight times a row of x, over inputs start … start + BLOCK_K. row: int64 [R, 1]."""
    HALF: tl.constexpr = BLOCK_K // 2
    j = start // 2 + tl.arange(0, HALF)[None, :]
    group = start // 32 + tl.arange(0, BLOCK_K // 32)[None, :]
    byte = tl.load(blocks + row * (K // 2) + j, mask=(j < K // 2) & here, other=0)
    scale = tl.load(scales + row * (K // 32) + group, mask=(group < K // 32) & here, other=0)
    even, odd = _half_tiles(byte, scale)
    x_even = tl.load(x_row + 2 * j, mask=(j < K // 2) & here, other=0.0).to(tl.float32)
    x_odd = tl.load(x_row + 2 * j + 1, mask=(j < K // 2) & here, other=0.0).to(tl.float32)
    return tl.sum(even * x_even + odd * x_odd, axis=1)


@triton.jit
def _few_up_kernel(
    x, blocks, scales, bias, ids, tokens, output, N, K, E, x_stride, rows, row_step, up_offset, alpha, limit,
    NUM_CHOSEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (tile of outputs, pair): activation(gate, up) of the pair's row, to output [P, N]."""
    pair = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(ids + pair).to(tl.int64)
    if (expert >= 0) & (expert < E):
        if tl.program_id(0) == 0:
            tl.atomic_add(tokens + expert, 1)
        row = expert * rows + tl.minimum(n, N - 1).to(tl.int64) * row_step
        x_row = x + (pair // NUM_CHOSEN).to(tl.int64) * x_stride
        gate = tl.zeros([BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            gate += _dots(blocks, scales, x_row, row[:, None], start, K, True, BLOCK_K)
            up += _dots(blocks, scales, x_row, (row + up_offset)[:, None], start, K, True, BLOCK_K)
        if HAS_BIAS:
            gate += tl.load(bias + row).to(tl.float32)
            up += tl.load(bias + row + up_offset).to(tl.float32)
        gated = activate(gate, up, alpha, limit, KIND)
        tl.store(output + pair.to(tl.int64) * N + n, gated.to(output.dtype.element_ty), mask=n < N)


@triton.jit
def _few_down_kernel(
    hidden, blocks, scales, bias, ids, weights, output, N, K, E,
    NUM_CHOSEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (tile of outputs, token): the weighted sum over the token's experts, to output [T, N]."""
    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([BLOCK_N], tl.float32)
    for index in tl.static_range(NUM_CHOSEN):
        pair = token * NUM_CHOSEN + index
        expert = tl.load(ids + pair).to(tl.int64)
        here = (expert >= 0) & (expert < E)
        row = tl.where(here, expert, 0) * N + tl.minimum(n, N - 1).to(tl.int64)
        product = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            product += _dots(blocks, scales, hidden + pair * K, row[:, None], start, K, here, BLOCK_K)
        if HAS_BIAS:
            product += tl.load(bias + row).to(tl.float32)
        total += product * tl.where(here, tl.load(weights + pair), 0.0)
    tl.store(output + token * N + n, total.to(output.dtype.element_ty), mask=n < N)


@triton.jit
def _tile(blocks, scales, row, start, K, dtype: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows of a weight over inputs start … start + BLOCK_K, [R, BLOCK_K]; zeros behind the last. row: int64 [R]."""
    j = start // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    group = start // 32 + tl.arange(0, BLOCK_K // 32)[None, :]
    byte = tl.load(blocks + row[:, None] * (K // 2) + j, mask=j < K // 2, other=0)
    scale = tl.load(scales + row[:, None] * (K // 32) + group, mask=group < K // 32, other=0)
    even, odd = _half_tiles(byte, scale)
    return tl.interleave(even.to(dtype), odd.to(dtype))


@triton.jit
def _grouped_kernel(
    x, blocks, scales, bias, output, pairs, experts, starts, counts,
    N, K, x_stride, rows, row_step, up_offset, alpha, limit,
    DIVISOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program: a block of pairs and a tile of outputs, to output [P, N]. DIVISOR: a pair's row of x is pair //
    DIVISOR."""
    num_tiles = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) // num_tiles
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.load(experts + block).to(tl.int64)
    if expert >= 0:
        inside, pair = pairs_of_block(pairs, starts, counts, block, BLOCK_M)
        n = tl.program_id(0) % num_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        row = expert * rows + tl.minimum(n, N - 1).to(tl.int64) * row_step
        x_rows = x + (pair // DIVISOR)[:, None] * x_stride
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            left = tl.load(x_rows + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
            right = _tile(blocks, scales, row, start, K, x.dtype.element_ty, BLOCK_K)
            total = tl.dot(left, right.T, total, input_precision="ieee")
            if KIND != 0:
                right = _tile(blocks, scales, row + up_offset, start, K, x.dtype.element_ty, BLOCK_K)
                total_up = tl.dot(left, right.T, total_up, input_precision="ieee")
        finish_block(
            output, bias + row, total, total_up, pair, inside, n, N, up_offset, alpha, limit, KIND, False, HAS_BIAS
        )


def few_up(x: torch.Tensor, matrix: Mxfp4Weight, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """x [T, K], ids [T, k] -> activation(gate, up) of each pair whose expert is here, [P, N]. Counts them in tokens."""
    assert matrix.kind != 0, "a product with a gate"
    num_pairs, num_chosen = ids.numel(), ids.shape[1]
    size, inputs = matrix.num_outputs, matrix.num_inputs
    output = torch.empty(num_pairs, size, dtype=x.dtype, device=x.device)
    block_n, most_k = _FEW_CUT
    _few_up_kernel[(triton.cdiv(size, block_n), num_pairs)](
        x, matrix.blocks, matrix.scales, x if matrix.bias is None else matrix.bias, ids, tokens, output, size, inputs,
        len(tokens), x.stride(0), matrix.blocks.shape[1], matrix.row_step, matrix.up_offset, matrix.alpha,
        matrix.limit, NUM_CHOSEN=num_chosen, BLOCK_N=block_n, BLOCK_K=min(most_k, triton.next_power_of_2(inputs)),
        KIND=matrix.kind, HAS_BIAS=matrix.bias is not None, DEPENDENT=has_dependent_launch(x.device), num_warps=4,
        **launch_options(x.device),
    )  # fmt: skip
    return output


def few_down(hidden: torch.Tensor, matrix: Mxfp4Weight, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """hidden [P, K], ids and weights fp32 [T, k] -> the weighted sum of each token's experts that are here, [T, N]."""
    num_rows, num_chosen = ids.shape
    size, inputs = matrix.num_outputs, matrix.num_inputs
    output = torch.empty(num_rows, size, dtype=hidden.dtype, device=hidden.device)
    block_n, most_k = _FEW_CUT
    _few_down_kernel[(triton.cdiv(size, block_n), num_rows)](
        hidden, matrix.blocks, matrix.scales, hidden if matrix.bias is None else matrix.bias, ids, weights, output,
        size, inputs, matrix.blocks.shape[0], NUM_CHOSEN=num_chosen, BLOCK_N=block_n,
        BLOCK_K=min(most_k, triton.next_power_of_2(inputs)), HAS_BIAS=matrix.bias is not None,
        DEPENDENT=has_dependent_launch(hidden.device), num_warps=4, **launch_options(hidden.device),
    )  # fmt: skip
    return output


def grouped_matmul(
    x: torch.Tensor,
    matrix: Mxfp4Weight,
    order: PairOrder,
    num_pairs: int,
    divisor: int,
    tiles: GroupedTiles,
    *,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [rows, K], of pair p the row p // divisor -> [P, N]; rows of pairs without an expert here stay as they are
    found. order: of blocks of tiles.block_m."""
    size, inputs = matrix.num_outputs, matrix.num_inputs
    output = torch.empty(num_pairs, size, dtype=output_dtype or x.dtype, device=x.device)
    _grouped_kernel[(len(order.experts) * triton.cdiv(size, tiles.block_n),)](
        x, matrix.blocks, matrix.scales, x if matrix.bias is None else matrix.bias, output, order.pairs,
        order.experts, order.starts, order.counts, size, inputs, x.stride(0), matrix.blocks.shape[1], matrix.row_step,
        matrix.up_offset, matrix.alpha, matrix.limit,
        DIVISOR=divisor, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, KIND=matrix.kind,
        HAS_BIAS=matrix.bias is not None, DEPENDENT=has_dependent_launch(x.device), num_warps=tiles.num_warps,
        num_stages=tiles.num_stages, **launch_options(x.device),
    )  # fmt: skip
    return output
