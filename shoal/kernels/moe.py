"""Products of tokens with the experts that they are routed to, all experts of a layer in one launch. Called by
quantization/stacked_experts.py.

For one token or a few, a program multiplies its outputs of an expert's weight with one row: only weights of chosen
experts are read (`_few_up_kernel`, `_few_down_kernel`). For more, pairs stand by expert (`moe_routing.order_pairs`) and
a program multiplies a block of them with a tile of their expert's weight (`_grouped_kernel`): one chain of matrix
instructions over all inputs, as kernels/fixed_matmul.py defines it, so that a row's bits depend on the row alone.

A weight may have a byte an element, FP8 or INT8 (`ExpertWeight.scales`): it is converted in registers, rows stay as
they are, and scales act on sums in fp32. Called so by quantization/byte_experts.py.

H200 (copies: 4.3 TB/s), 2026-11, bf16, 128 experts of 768 with 8 a token over 2048 numbers, both products: 1 token in
23 µs (18 is what the bytes take), 16 tokens in 188 µs (84 experts hit), 256 in 311 µs, 8192 in 1.39 ms (445 TFLOP/s).
Expert by expert (`quantization.looped_experts`) 1, 16, 256 and 4096 tokens take 3.2, 20, 15 and 16 ms.

T tokens, k experts a token, P = T * k pairs, E experts, K inputs, N outputs of a product (of the gated one its gates).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoal.kernels.activation import silu_product
from shoal.kernels.expert_weights import ExpertWeight, GroupedTiles
from shoal.kernels.launch import has_dependent_launch, launch_options
from shoal.kernels.linear import as_numbers, as_operand, sum_vectors
from shoal.kernels.moe_routing import PairOrder

# Of the products for few tokens: outputs of a program, inputs at once, warps. For weights of a byte an element as many
# bytes.
UP_CUT, BYTE_UP_CUT = (2, 2048, 4), (4, 1024, 4)
DOWN_CUT, BYTE_DOWN_CUT = (2, 1024, 4), (4, 1024, 4)
# Inputs that a thread loads at once.
_VECTOR = tl.constexpr(8)


@triton.jit
def activate(gate, up, alpha, limit, KIND: tl.constexpr):
    """In fp32. KIND as above."""
    if KIND == 1:
        result = silu_product(gate, up)
    else:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        result = (up + 1.0) * (gate / (1.0 + tl.exp(-alpha * gate)))
    return result


@triton.jit
def _vectors(BLOCK_K: tl.constexpr):
    """[1, BLOCK_K]: the inputs of a block, of which a thread is to load _VECTOR at once, of x and the weight alike. Of
    bytes it would take 16, and what it holds of the weight went through shared memory to meet x."""
    return tl.max_contiguous(tl.arange(0, BLOCK_K), _VECTOR)[None, :]


@triton.jit
def _vector_scales(
    scales, row, start, K, BLOCK_K: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr
):  # fmt: skip
    """Of an expert's blocks: what vectors of the inputs from `start` on are multiplied by, [rows, BLOCK_K / _VECTOR].
    row: [rows, 1]. Few are loaded, and whatever thread needs one has it."""
    STEP: tl.constexpr = SCALE_K & -SCALE_K
    UNIT: tl.constexpr = STEP if STEP < BLOCK_K else BLOCK_K
    COUNT: tl.constexpr = BLOCK_K // UNIT
    ROWS: tl.constexpr = row.shape[0]
    k = start + UNIT * tl.arange(0, COUNT)[None, :]
    scale = tl.load(scales + row // SCALE_N * tl.cdiv(K, SCALE_K) + k // SCALE_K, mask=k < K, other=0.0)
    whole = tl.broadcast_to(scale[:, :, None], (ROWS, COUNT, UNIT // _VECTOR))
    return tl.reshape(whole, (ROWS, BLOCK_K // _VECTOR))


@triton.jit
def _few_up_kernel(
    x, weight, scales, bias, ids, tokens, output, N, K, E, x_stride, expert_stride, w_stride, scale_stride, bias_stride,
    row_step, up_offset, alpha, limit, NUM_CHOSEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    KIND: tl.constexpr, FP8_BITS: tl.constexpr, SCALES: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (tile of outputs, pair): activation(gate, up) of the pair's row, to output [P, N]."""
    pair = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = _vectors(BLOCK_K)
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
        own_scales = scales + expert * scale_stride
        total = tl.zeros([BLOCK_N, BLOCK_K // _VECTOR], tl.float32)
        total_up = tl.zeros([BLOCK_N, BLOCK_K // _VECTOR], tl.float32)
        for start in range(0, K, BLOCK_K):
            inside = start + k < K
            value = tl.load(x_row + start + k, mask=inside, other=0.0).to(tl.float32)
            gate_tile = tl.load(pointer + start, mask=inside, other=0.0)
            up_tile = tl.load(pointer + up_offset * w_stride + start, mask=inside, other=0.0)
            part = sum_vectors(as_numbers(gate_tile, FP8_BITS).to(tl.float32) * value, _VECTOR)
            part_up = sum_vectors(as_numbers(up_tile, FP8_BITS).to(tl.float32) * value, _VECTOR)
            if SCALES == 2:
                part *= _vector_scales(own_scales, row, start, K, BLOCK_K, SCALE_N, SCALE_K)
                part_up *= _vector_scales(own_scales, row + up_offset, start, K, BLOCK_K, SCALE_N, SCALE_K)
            total += part
            total_up += part_up
        gate = tl.sum(total, axis=1)[:, None]
        up = tl.sum(total_up, axis=1)[:, None]
        if SCALES == 1:
            gate *= tl.load(own_scales + row)
            up *= tl.load(own_scales + row + up_offset)
        if HAS_BIAS:
            own = bias + expert * bias_stride + row
            gate += tl.load(own).to(tl.float32)
            up += tl.load(own + up_offset).to(tl.float32)
        gated = activate(gate, up, alpha, limit, KIND)
        tl.store(output + pair.to(tl.int64) * N + n, gated.to(output.dtype.element_ty), mask=n < N)


@triton.jit
def _few_down_kernel(
    hidden, weight, scales, bias, ids, weights, output, N, K, E, expert_stride, w_stride, scale_stride, bias_stride,
    NUM_CHOSEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr, FP8_BITS: tl.constexpr,
    SCALES: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (tile of outputs, token): the weighted sum over the token's experts, to output [T, N].

    EARLY: a row of an expert is one block, and all of them are on their way before the kernel in front has ended.
    """
    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = _vectors(BLOCK_K)
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
    total = tl.zeros([BLOCK_N, BLOCK_K // _VECTOR], tl.float32)
    added = tl.zeros([BLOCK_N, 1], tl.float32)
    for index in tl.static_range(NUM_CHOSEN):
        pair = token * NUM_CHOSEN + index
        expert = tl.load(ids + pair).to(tl.int64)
        here = (expert >= 0) & (expert < E)
        expert = tl.where(here, expert, 0)
        share = tl.where(here, tl.load(weights + pair), 0.0)
        own_scales = scales + expert * scale_stride
        factor = share
        if SCALES == 1:
            factor = share * tl.load(own_scales + row)
        if EARLY:
            value = tl.load(hidden + pair * K + k, mask=(k < K) & here, other=0.0).to(tl.float32)
            part = sum_vectors(as_numbers(tiles[index], FP8_BITS).to(tl.float32) * value, _VECTOR)
            if SCALES == 2:
                part *= _vector_scales(own_scales, row, 0, K, BLOCK_K, SCALE_N, SCALE_K)
            total += part * factor
        else:
            pointer = weight + expert * expert_stride + row * w_stride + k
            tile = tl.load(pointer, mask=(k < K) & here, other=0.0)
            for start in range(0, K, BLOCK_K):
                # The next block is on its way while this one is multiplied.
                later = start + BLOCK_K
                next_tile = tl.load(pointer + later, mask=(later + k < K) & here, other=0.0)
                value = tl.load(hidden + pair * K + start + k, mask=(start + k < K) & here, other=0.0).to(tl.float32)
                part = sum_vectors(as_numbers(tile, FP8_BITS).to(tl.float32) * value, _VECTOR)
                if SCALES == 2:
                    part *= _vector_scales(own_scales, row, start, K, BLOCK_K, SCALE_N, SCALE_K)
                total += part * factor
                tile = next_tile
        if HAS_BIAS:
            added += tl.load(bias + expert * bias_stride + row).to(tl.float32) * share
    result = tl.sum(total, axis=1)[:, None] + added
    tl.store(output + token * N + n, result.to(output.dtype.element_ty), mask=n < N)


@triton.jit
def pairs_of_block(pairs, starts, counts, block, BLOCK_M: tl.constexpr):
    """(which of BLOCK_M there are, the pairs: int64), both [BLOCK_M], of a block of a `PairOrder`."""
    m = tl.arange(0, BLOCK_M)
    inside = m < tl.load(counts + block)
    return inside, tl.load(pairs + tl.load(starts + block) + m, mask=inside, other=0).to(tl.int64)


@triton.jit
def finish_block(
    output, own_bias, total, total_up, pair, inside, n, N, up_offset, alpha, limit,
    KIND: tl.constexpr, WEIGHT_LEFT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Add biases (own_bias: pointers to those of the rows), activate, and store to output [P, N]. total and total_up:
    [pairs, rows], transposed where the weight was left."""
    if HAS_BIAS:
        added = tl.load(own_bias).to(tl.float32)
        total += added[:, None] if WEIGHT_LEFT else added[None, :]
        if KIND != 0:
            added = tl.load(own_bias + up_offset).to(tl.float32)
            total_up += added[:, None] if WEIGHT_LEFT else added[None, :]
    if KIND != 0:
        total = activate(total, total_up, alpha, limit, KIND)
    if WEIGHT_LEFT:
        outputs = output + pair[None, :] * N + n[:, None]
        mask = inside[None, :] & (n < N)[:, None]
    else:
        outputs = output + pair[:, None] * N + n[None, :]
        mask = inside[:, None] & (n < N)[None, :]
    tl.store(outputs, total.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _tile(
    x_rows, inside, weight_rows, scale, start, K,
    BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr, WEIGHT_LEFT: tl.constexpr, FP8_BITS: tl.constexpr,
    ASSEMBLES: tl.constexpr, BY_BLOCKS: tl.constexpr, total,
):  # fmt: skip
    """total += rows of x times rows of a weight, over BLOCK_K inputs; transposed where the weight is left. BY_BLOCKS:
    the product of each row of the weight times its scale."""
    k = start + tl.arange(0, BLOCK_K)
    if WHOLE_K:
        left = tl.load(x_rows + k[None, :], mask=inside, other=0.0)
        right = tl.load(weight_rows + k[None, :])
    else:
        left = tl.load(x_rows + k[None, :], mask=inside & (k < K)[None, :], other=0.0)
        right = tl.load(weight_rows + k[None, :], mask=(k < K)[None, :], other=0.0)
    right = as_operand(right, left, FP8_BITS, ASSEMBLES)
    if BY_BLOCKS:
        if WEIGHT_LEFT:
            total += tl.dot(right, left.T, input_precision="ieee") * scale[:, None]
        else:
            total += tl.dot(left, right.T, input_precision="ieee") * scale[None, :]
    elif WEIGHT_LEFT:
        total = tl.dot(right, left.T, total, input_precision="ieee")
    else:
        total = tl.dot(left, right.T, total, input_precision="ieee")
    return total


@triton.jit
def _grouped_kernel(
    x, weight, scales, bias, output, pairs, experts, starts, counts,
    N, K, x_stride, expert_stride, w_stride, scale_stride, bias_stride, row_step, up_offset, alpha, limit,
    DIVISOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr,
    KIND: tl.constexpr, WEIGHT_LEFT: tl.constexpr, FP8_BITS: tl.constexpr, ASSEMBLES: tl.constexpr,
    SCALES: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
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
        inside, pair = pairs_of_block(pairs, starts, counts, block, BLOCK_M)
        n = tl.program_id(0) % num_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.minimum(n, N - 1).to(tl.int64) * row_step
        x_rows = x + (pair // DIVISOR)[:, None] * x_stride
        weight_rows = weight + expert * expert_stride + row[:, None] * w_stride
        own_scales = scales + expert * scale_stride
        scale_rows = own_scales + row // SCALE_N * tl.cdiv(K, SCALE_K)
        scale_rows_up = own_scales + (row + up_offset) // SCALE_N * tl.cdiv(K, SCALE_K)
        if WEIGHT_LEFT:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            total_up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            total_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        other_half = up_offset * w_stride
        scale = tl.zeros([BLOCK_N], tl.float32)
        scale_up = scale
        if SCALES == 2:
            scale = tl.load(scale_rows)
            if KIND != 0:
                scale_up = tl.load(scale_rows_up)
        for start in range(0, K, BLOCK_K):
            # A step ahead: these are too small for asynchronous copies.
            next_scale = scale
            next_up = scale_up
            if SCALES == 2:  # BLOCK_K divides SCALE_K
                later = tl.minimum(start + BLOCK_K, K - 1) // SCALE_K
                next_scale = tl.load(scale_rows + later)
                if KIND != 0:
                    next_up = tl.load(scale_rows_up + later)
            total = _tile(
                x_rows, inside[:, None], weight_rows, scale, start, K, BLOCK_K, WHOLE_K, WEIGHT_LEFT, FP8_BITS,
                ASSEMBLES, SCALES == 2, total,
            )  # fmt: skip
            if KIND != 0:
                total_up = _tile(
                    x_rows, inside[:, None], weight_rows + other_half, scale_up, start, K, BLOCK_K, WHOLE_K,
                    WEIGHT_LEFT, FP8_BITS, ASSEMBLES, SCALES == 2, total_up,
                )  # fmt: skip
            scale = next_scale
            scale_up = next_up
        if SCALES == 1:
            scale = tl.load(own_scales + row)
            total *= scale[:, None] if WEIGHT_LEFT else scale[None, :]
            if KIND != 0:
                scale = tl.load(own_scales + row + up_offset)
                total_up *= scale[:, None] if WEIGHT_LEFT else scale[None, :]
        own_bias = bias + expert * bias_stride + row
        finish_block(
            output, own_bias, total, total_up, pair, inside, n, N, up_offset, alpha, limit, KIND, WEIGHT_LEFT, HAS_BIAS
        )


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


def few_up(x: torch.Tensor, matrix: ExpertWeight, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """x [T, K], ids [T, k] -> activation(gate, up) of each pair whose expert is here, [P, N]. Counts them in tokens."""
    num_pairs, num_chosen = ids.numel(), ids.shape[1]
    size, inputs = matrix.num_outputs, matrix.weight.shape[2]
    output = torch.empty(num_pairs, size, dtype=x.dtype, device=x.device)
    bias = x if matrix.bias is None else matrix.bias
    scales = x if matrix.scales is None else matrix.scales
    block_n, most_k, num_warps = UP_CUT if matrix.scales is None else BYTE_UP_CUT
    block_k = max(_VECTOR.value, min(most_k, triton.next_power_of_2(inputs)))
    _few_up_kernel[(triton.cdiv(size, block_n), num_pairs)](
        x, matrix.weight, scales, bias, ids, tokens, output, size, inputs, len(tokens), x.stride(0),
        matrix.weight.stride(0), matrix.weight.stride(1), scales.stride(0), bias.stride(0), matrix.row_step,
        matrix.up_offset, matrix.alpha, matrix.limit, NUM_CHOSEN=num_chosen, BLOCK_N=block_n, BLOCK_K=block_k,
        KIND=matrix.kind, **matrix.forms, HAS_BIAS=matrix.bias is not None,
        DEPENDENT=has_dependent_launch(x.device), num_warps=num_warps, **launch_options(x.device),
    )  # fmt: skip
    return output


def few_down(hidden: torch.Tensor, matrix: ExpertWeight, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """hidden [P, K], ids and weights fp32 [T, k] -> the weighted sum of each token's experts that are here, [T, N]."""
    num_rows, num_chosen = ids.shape
    size, inputs = matrix.weight.shape[1:]
    output = torch.empty(num_rows, size, dtype=hidden.dtype, device=hidden.device)
    bias = hidden if matrix.bias is None else matrix.bias
    scales = hidden if matrix.scales is None else matrix.scales
    block_n, most_k, num_warps = DOWN_CUT if matrix.scales is None else BYTE_DOWN_CUT
    block_k = max(_VECTOR.value, min(most_k, triton.next_power_of_2(inputs)))
    _few_down_kernel[(triton.cdiv(size, block_n), num_rows)](
        hidden, matrix.weight, scales, bias, ids, weights, output, size, inputs, matrix.weight.shape[0],
        matrix.weight.stride(0), matrix.weight.stride(1), scales.stride(0), bias.stride(0), NUM_CHOSEN=num_chosen,
        BLOCK_N=block_n, BLOCK_K=block_k, EARLY=inputs <= block_k, **matrix.forms,
        HAS_BIAS=matrix.bias is not None, DEPENDENT=has_dependent_launch(hidden.device), num_warps=num_warps,
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
    scales = x if matrix.scales is None else matrix.scales
    block_k = tiles.block_k
    if matrix.block is not None:  # the largest power of two that divides both
        block_k = min(block_k, matrix.block[1] & -matrix.block[1])
    _grouped_kernel[(len(order.experts) * triton.cdiv(size, tiles.block_n),)](
        x, matrix.weight, scales, bias, output, order.pairs, order.experts, order.starts, order.counts,
        size, inputs, x.stride(0), matrix.weight.stride(0), matrix.weight.stride(1), scales.stride(0), bias.stride(0),
        matrix.row_step, matrix.up_offset, matrix.alpha, matrix.limit,
        DIVISOR=divisor, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=block_k,
        WHOLE_K=inputs % block_k == 0, KIND=matrix.kind, WEIGHT_LEFT=tiles.weight_left, **matrix.forms,
        ASSEMBLES=x.device.type == "cuda", HAS_BIAS=matrix.bias is not None,
        DEPENDENT=has_dependent_launch(x.device), num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        **launch_options(x.device),
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
