"""Products of tokens with the experts that they are routed to, all experts of a layer in one launch. Called by
quantization/stacked_experts.py.

For one token or a few, a program multiplies its outputs of an expert's weight with one row: only weights of chosen
experts are read (`_few_up_kernel`, `_few_down_kernel`). For more, pairs stand by expert (`moe_routing.order_pairs`) and
a program multiplies a block of them with a tile of their expert's weight (`_grouped_kernel`): one chain of matrix
instructions over all inputs, as kernels/fixed_matmul.py defines it, so that a row's bits depend on the row alone.

H200 (copies: 4.3 TB/s), 2026-11, bf16, 128 experts of 768 with 8 a token over 2048 numbers, both products: 1 token in
23 µs (18 is what the bytes take), 16 tokens in 188 µs (84 experts hit), 256 in 311 µs, 8192 in 1.39 ms (445 TFLOP/s).
Expert by expert (`quantization.looped_experts`) 1, 16, 256 and 4096 tokens take 3.2, 20, 15 and 16 ms.

T tokens, k experts a token, P = T * k pairs, E experts, K inputs, N outputs of a product (of the gated one its gates).
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoal.kernels.activation import silu_product
from shoal.kernels.launch import has_dependent_launch, launch_options
from shoal.kernels.moe_routing import PairOrder

# What is made of gate and up: as is (no gate), silu(gate) * up, gpt-oss' clamped form.
PLAIN, SILU, CLAMPED = 0, 1, 2
KINDS = {None: PLAIN, "silu": SILU, "clamped": CLAMPED}
# Of the products for few tokens: outputs of a program, inputs at once, warps.
UP_CUT = (2, 2048, 4)
DOWN_CUT = (2, 1024, 4)


@dataclasses.dataclass(frozen=True)
class ExpertWeight:
    """weight [E, rows, K], bias [E, rows] or None. Of a gated product rows are 2 N: gates first, or by turns."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    kind: int = PLAIN
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = float("inf")

    @property
    def num_outputs(self) -> int:
        return self.weight.shape[1] // (1 if self.kind == PLAIN else 2)

    @property
    def row_step(self) -> int:
        """From the gate of an output to that of the next, in rows; `up_offset`: from a gate to its up."""
        return 2 if self.interleaved and self.kind != PLAIN else 1

    @property
    def up_offset(self) -> int:
        return 1 if self.interleaved else self.num_outputs


@triton.jit
def _activate(gate, up, alpha, limit, KIND: tl.constexpr):
    """In fp32. KIND as above."""
    if KIND == 1:
        result = silu_product(gate, up)
    else:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        result = (up + 1.0) * (gate / (1.0 + tl.exp(-alpha * gate)))
    return result


@triton.jit
def _sum_vectors(products):
    """[A, B] -> [A, B / 8]: each thread adds what it holds of a vector."""
    A: tl.constexpr = products.shape[0]
    B: tl.constexpr = products.shape[1]
    return tl.sum(tl.reshape(products, [A, B // 8, 8]), axis=2)


@triton.jit
def _few_up_kernel(
    x, weight, bias, ids, tokens, output, N, K, E, x_stride, expert_stride, w_stride, bias_stride, row_step, up_offset,
    alpha, limit, NUM_CHOSEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (tile of outputs, pair): activation(gate, up) of the pair's row, to output [P, N]."""
    pair = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    if DEPENDENT:  # in this order: `_few_down_kernel` reads ids before it waits
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(ids + pair).to(tl.int64)
    if (expert >= 0) & (expert < E):
        if tl.program_id(0) == 0:
            tl.atomic_add(tokens + expert, 1)
        row = tl.minimum(n, N - 1).to(tl.int64) * row_step
        pointer = weight + expert * expert_stride + row * w_stride + k
        x_row = x + (pair // NUM_CHOSEN).to(tl.int64) * x_stride
        total = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
        total_up = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
        for start in range(0, K, BLOCK_K):
            inside = start + k < K
            value = tl.load(x_row + start + k, mask=inside, other=0.0).to(tl.float32)
            gate_tile = tl.load(pointer + start, mask=inside, other=0.0)
            up_tile = tl.load(pointer + up_offset * w_stride + start, mask=inside, other=0.0)
            total += _sum_vectors(gate_tile.to(tl.float32) * value)
            total_up += _sum_vectors(up_tile.to(tl.float32) * value)
        gate = tl.sum(total, axis=1)[:, None]
        up = tl.sum(total_up, axis=1)[:, None]
        if HAS_BIAS:
            own = bias + expert * bias_stride + row
            gate += tl.load(own).to(tl.float32)
            up += tl.load(own + up_offset).to(tl.float32)
        gated = _activate(gate, up, alpha, limit, KIND)
        tl.store(output + pair.to(tl.int64) * N + n, gated.to(output.dtype.element_ty), mask=n < N)


@triton.jit
def _few_down_kernel(
    hidden, weight, bias, ids, weights, output, N, K, E, expert_stride, w_stride, bias_stride,
    NUM_CHOSEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
    HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (tile of outputs, token): the weighted sum over the token's experts, to output [T, N].

    EARLY: a row of an expert is one block, and all of them are on their way before the kernel in front has ended.
    """
    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    row = tl.minimum(n, N - 1).to(tl.int64)
    tiles = ()
    if DEPENDENT:
        gdc_launch_dependents()
    if EARLY:
        for index in tl.static_range(NUM_CHOSEN):
            expert = tl.load(ids + token * NUM_CHOSEN + index).to(tl.int64)
            here = (expert >= 0) & (expert < E)
            pointer = weight + tl.where(here, expert, 0) * expert_stride + row * w_stride + k
            tiles = tiles + (tl.load(pointer, mask=(k < K) & here, other=0.0),)  # type: ignore[assignment]
    if DEPENDENT:
        gdc_wait()
    total = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    added = tl.zeros([BLOCK_N, 1], tl.float32)
    for index in tl.static_range(NUM_CHOSEN):
        pair = token * NUM_CHOSEN + index
        expert = tl.load(ids + pair).to(tl.int64)
        here = (expert >= 0) & (expert < E)
        expert = tl.where(here, expert, 0)
        share = tl.where(here, tl.load(weights + pair), 0.0)
        if EARLY:
            value = tl.load(hidden + pair * K + k, mask=(k < K) & here, other=0.0).to(tl.float32)
            total += _sum_vectors(tiles[index].to(tl.float32) * (value * share))
        else:
            pointer = weight + expert * expert_stride + row * w_stride + k
            for start in range(0, K, BLOCK_K):
                inside = (start + k < K) & here
                value = tl.load(hidden + pair * K + start + k, mask=inside, other=0.0).to(tl.float32)
                tile = tl.load(pointer + start, mask=inside, other=0.0)
                total += _sum_vectors(tile.to(tl.float32) * (value * share))
        if HAS_BIAS:
            added += tl.load(bias + expert * bias_stride + row).to(tl.float32) * share
    result = tl.sum(total, axis=1)[:, None] + added
    tl.store(output + token * N + n, result.to(output.dtype.element_ty), mask=n < N)


@triton.jit
def _tile(
    x_rows, inside, weight_rows, start, K,
    BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr, WEIGHT_LEFT: tl.constexpr, total,
):  # fmt: skip
    """total += rows of x times rows of a weight, over BLOCK_K inputs; transposed where the weight is left."""
    k = start + tl.arange(0, BLOCK_K)
    if WHOLE_K:
        left = tl.load(x_rows + k[None, :], mask=inside, other=0.0)
        right = tl.load(weight_rows + k[None, :])
    else:
        left = tl.load(x_rows + k[None, :], mask=inside & (k < K)[None, :], other=0.0)
        right = tl.load(weight_rows + k[None, :], mask=(k < K)[None, :], other=0.0)
    if WEIGHT_LEFT:
        total = tl.dot(right, left.T, total, input_precision="ieee")
    else:
        total = tl.dot(left, right.T, total, input_precision="ieee")
    return total


@triton.jit
def _grouped_kernel(
    x, weight, bias, output, pairs, experts, starts, counts,
    N, K, x_stride, expert_stride, w_stride, bias_stride, row_step, up_offset, alpha, limit,
    DIVISOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr,
    KIND: tl.constexpr, WEIGHT_LEFT: tl.constexpr, HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program: a block of pairs and a tile of outputs, to output [P, N]; tiles of a block are neighbours, so that its
    rows and its expert's weight are read from the L2 cache. DIVISOR: a pair's row of x is pair // DIVISOR."""
    num_tiles = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) // num_tiles
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.load(experts + block).to(tl.int64)
    if expert >= 0:
        m = tl.arange(0, BLOCK_M)
        inside = m < tl.load(counts + block)
        pair = tl.load(pairs + tl.load(starts + block) + m, mask=inside, other=0).to(tl.int64)
        n = tl.program_id(0) % num_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.minimum(n, N - 1).to(tl.int64) * row_step
        x_rows = x + (pair // DIVISOR)[:, None] * x_stride
        weight_rows = weight + expert * expert_stride + row[:, None] * w_stride
        if WEIGHT_LEFT:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            total_up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            total_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        other_half = up_offset * w_stride
        for start in range(0, K, BLOCK_K):
            total = _tile(x_rows, inside[:, None], weight_rows, start, K, BLOCK_K, WHOLE_K, WEIGHT_LEFT, total)
            if KIND != 0:
                total_up = _tile(
                    x_rows, inside[:, None], weight_rows + other_half, start, K, BLOCK_K, WHOLE_K, WEIGHT_LEFT, total_up
                )
        if HAS_BIAS:
            own = bias + expert * bias_stride + row
            added = tl.load(own).to(tl.float32)
            total += added[:, None] if WEIGHT_LEFT else added[None, :]
            if KIND != 0:
                added = tl.load(own + up_offset).to(tl.float32)
                total_up += added[:, None] if WEIGHT_LEFT else added[None, :]
        if KIND != 0:
            total = _activate(total, total_up, alpha, limit, KIND)
        if WEIGHT_LEFT:
            outputs = output + pair[None, :] * N + n[:, None]
            mask = inside[None, :] & (n < N)[:, None]
        else:
            outputs = output + pair[:, None] * N + n[None, :]
            mask = inside[:, None] & (n < N)[None, :]
        tl.store(outputs, total.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _combine_kernel(
    pairs, weights, ids, output, H, E, NUM_CHOSEN: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    """Program (token, columns): the weighted sum of what the token's experts gave, in their order."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([BLOCK], tl.float32)
    for index in tl.static_range(NUM_CHOSEN):
        pair = token * NUM_CHOSEN + index
        expert = tl.load(ids + pair)
        here = (expert >= 0) & (expert < E)
        value = tl.load(pairs + pair * H + column, mask=inside & here, other=0.0).to(tl.float32)
        total += value * tl.load(weights + pair)
    tl.store(output + token * H + column, total.to(output.dtype.element_ty), mask=inside)


@dataclasses.dataclass(frozen=True)
class GroupedTiles:
    """How a grouped product is cut; never visible in its bits."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    weight_left: bool = False


# By how many pairs an expert gets if all get as many: up to so many, these.
_TILES = (
    (12, GroupedTiles(16, 64, 128, 4, 4, weight_left=True)),
    (24, GroupedTiles(32, 64, 128, 4, 3, weight_left=True)),
    (96, GroupedTiles(64, 64, 64, 4, 4)),
    (float("inf"), GroupedTiles(128, 128, 64, 8, 3)),
)
_FP32_TILES = ((16, GroupedTiles(16, 32, 32, 4, 2)), (float("inf"), GroupedTiles(64, 64, 32, 8, 2)))


def choose_tiles(num_pairs: int, num_experts: int, dtype: torch.dtype, device: torch.device) -> GroupedTiles:
    """By speed alone; with as many stages as this GPU's shared memory holds."""
    each = num_pairs / num_experts
    return next(tiles for most, tiles in _fitting_tiles(dtype, device) if each <= most)


def every_tiles(dtype: torch.dtype, device: torch.device) -> list[GroupedTiles]:
    """All that may be chosen."""
    return [tiles for _, tiles in _fitting_tiles(dtype, device)]


@functools.cache
def _fitting_tiles(dtype: torch.dtype, device: torch.device) -> list[tuple[float, GroupedTiles]]:
    shared_bytes = 1 << 20  # interpreted
    if device.type == "cuda":
        shared_bytes = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    fitting = []
    for most, tiles in _FP32_TILES if dtype is torch.float32 else _TILES:
        stage_bytes = (tiles.block_m + 2 * tiles.block_n) * tiles.block_k * dtype.itemsize
        num_stages = max(1, min(tiles.num_stages, shared_bytes // stage_bytes))
        fitting.append((most, dataclasses.replace(tiles, num_stages=num_stages)))
    return fitting


def few_up(x: torch.Tensor, matrix: ExpertWeight, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """x [T, K], ids [T, k] -> activation(gate, up) of each pair whose expert is here, [P, N]. Counts them in tokens."""
    num_pairs, num_chosen = ids.numel(), ids.shape[1]
    size, inputs = matrix.num_outputs, matrix.weight.shape[2]
    output = torch.empty(num_pairs, size, dtype=x.dtype, device=x.device)
    bias = x if matrix.bias is None else matrix.bias
    block_n, most_k, num_warps = UP_CUT
    block_k = min(most_k, triton.next_power_of_2(inputs))
    _few_up_kernel[(triton.cdiv(size, block_n), num_pairs)](
        x, matrix.weight, bias, ids, tokens, output, size, inputs, len(tokens), x.stride(0), matrix.weight.stride(0),
        matrix.weight.stride(1), bias.stride(0), matrix.row_step, matrix.up_offset, matrix.alpha, matrix.limit,
        NUM_CHOSEN=num_chosen, BLOCK_N=block_n, BLOCK_K=block_k, KIND=matrix.kind, HAS_BIAS=matrix.bias is not None,
        DEPENDENT=has_dependent_launch(x.device), num_warps=num_warps, **launch_options(x.device),
    )  # fmt: skip
    return output


def few_down(hidden: torch.Tensor, matrix: ExpertWeight, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """hidden [P, K], ids and weights fp32 [T, k] -> the weighted sum of each token's experts that are here, [T, N]."""
    num_rows, num_chosen = ids.shape
    size, inputs = matrix.weight.shape[1:]
    output = torch.empty(num_rows, size, dtype=hidden.dtype, device=hidden.device)
    bias = hidden if matrix.bias is None else matrix.bias
    block_n, most_k, num_warps = DOWN_CUT
    block_k = min(most_k, triton.next_power_of_2(inputs))
    _few_down_kernel[(triton.cdiv(size, block_n), num_rows)](
        hidden, matrix.weight, bias, ids, weights, output, size, inputs, matrix.weight.shape[0],
        matrix.weight.stride(0), matrix.weight.stride(1), bias.stride(0), NUM_CHOSEN=num_chosen, BLOCK_N=block_n,
        BLOCK_K=block_k, EARLY=inputs <= block_k, HAS_BIAS=matrix.bias is not None,
        DEPENDENT=has_dependent_launch(hidden.device), num_warps=num_warps,
        **launch_options(hidden.device),
    )  # fmt: skip
    return output


def grouped_matmul(
    x: torch.Tensor,
    matrix: ExpertWeight,
    order: PairOrder,
    num_pairs: int,
    divisor: int,
    tiles: GroupedTiles,
    *,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [rows, K], of pair p the row p // divisor -> [P, N]; rows of pairs without an expert here stay as they are
    found. order: of blocks of tiles.block_m."""
    size, inputs = matrix.num_outputs, matrix.weight.shape[2]
    output = torch.empty(num_pairs, size, dtype=output_dtype or x.dtype, device=x.device)
    bias = x if matrix.bias is None else matrix.bias
    _grouped_kernel[(len(order.experts) * triton.cdiv(size, tiles.block_n),)](
        x, matrix.weight, bias, output, order.pairs, order.experts, order.starts, order.counts,
        size, inputs, x.stride(0), matrix.weight.stride(0), matrix.weight.stride(1), bias.stride(0), matrix.row_step,
        matrix.up_offset, matrix.alpha, matrix.limit,
        DIVISOR=divisor, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        WHOLE_K=inputs % tiles.block_k == 0, KIND=matrix.kind, WEIGHT_LEFT=tiles.weight_left,
        HAS_BIAS=matrix.bias is not None, DEPENDENT=has_dependent_launch(x.device), num_warps=tiles.num_warps,
        num_stages=tiles.num_stages, **launch_options(x.device),
    )  # fmt: skip
    return output


def combine(
    pairs: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, num_experts: int, dtype: torch.dtype
) -> torch.Tensor:
    """pairs [P, H], weights fp32 and ids [T, k] -> the weighted sum of each token's pairs that have an expert here."""
    num_rows, num_chosen = ids.shape
    size = pairs.shape[1]
    output = torch.empty(num_rows, size, dtype=dtype, device=pairs.device)
    block = min(1024, triton.next_power_of_2(size))
    if num_rows:
        _combine_kernel[(num_rows, triton.cdiv(size, block))](
            pairs, weights, ids, output, size, num_experts, NUM_CHOSEN=num_chosen, BLOCK=block,
            DEPENDENT=has_dependent_launch(pairs.device), num_warps=4, **launch_options(pairs.device),
        )  # fmt: skip
    return output
