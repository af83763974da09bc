"""Products of tokens with experts whose weights are integers of 4 or 8 bits in groups with a scale each (GPTQ, AWQ):
what kernels/moe.py is for plain ones, and cut like it. Called by quantization/packed_experts.py. Integers stay exact,
scales act on sums in fp32 (see packed_slab.py).

T tokens, k experts a token, P = T * k pairs, E experts, K inputs, N outputs of a product (of the gated one its gates).
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoal.kernels.expert_weights import ExpertRows, GroupedTiles, Tiles, has_wgmma
from shoal.kernels.launch import has_dependent_launch, launch_options
from shoal.kernels.moe import activate, finish_block, pairs_of_block
from shoal.kernels.moe_routing import PairOrder
from shoal.kernels.packed_slab import PART_SCALE, X_SCALE, add_slab, load_groups, unpack_slab
from shoal.kernels.packed_weight import slab_inputs

# Of the products for few tokens: outputs of a program by 8, warps; each warp takes another slab, of the second product
# another expert, too.
_UP_CUT = (2, 4)
_DOWN_CUT = (2, 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedExpertWeight(ExpertRows):
    """Of each expert a `PackedWeight`: words int32 [E, slabs, rows, 16], scales floating [E, groups, rows], zeros uint8
    [E, groups, rows]; None: 2^(bits - 1) for all."""

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int
    group_size: int
    num_inputs: int

    @property
    def num_experts(self) -> int:
        return self.words.shape[0]

    @property
    def num_rows(self) -> int:
        return self.words.shape[2]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Slabs, groups and rows of an expert."""
        return self.words.shape[1], self.scales.shape[1], self.words.shape[2]

    @property
    def has_whole_slabs(self) -> bool:
        """Whether no slab has inputs of two groups."""
        return self.group_size >= slab_inputs(self.bits)

    def tiles(self, dtype: torch.dtype) -> Tiles:
        slab = slab_inputs(self.bits)
        few = (
            (12, GroupedTiles(16, 64, slab, 4, 3, weight_left=True)),
            (24, GroupedTiles(32, 64, slab, 4, 3, weight_left=True)),
        )
        if not self.has_whole_slabs:
            return (*few, (float("inf"), GroupedTiles(64, 64, slab, 4, 2, weight_left=True, gates_apart=True)))
        if has_wgmma(self.words.device):
            some = GroupedTiles(64, 64, slab, 4, 3, weight_left=True)
            return (*few, (96, some), (float("inf"), GroupedTiles(128, 128, slab, 8, 3, weight_left=True)))
        # Zeros take registers, too.
        some = GroupedTiles(64, 64, slab, 4, 2, weight_left=True, gates_apart=self.zeros is not None)
        return (*few, (96, some), (float("inf"), GroupedTiles(128, 64, slab, 8, 3, gates_apart=True)))


@triton.jit
def _load_words(words, slab, rows, here, num_slabs, num_rows, COUNT: tl.constexpr):
    """For each of COUNT `rows` [8, 1, 1] its words of a slab, [8, WARPS, 16]. slab [1, WARPS, 1]: a warp's."""
    word = tl.arange(0, 16)[None, None, :] + 0 * tl.arange(0, 8)[:, None, None]
    found = ()
    for index in tl.static_range(COUNT):
        address = words + (slab * num_rows + rows[index]) * 16 + word
        found = found + (tl.load(address, mask=(slab < num_slabs) & here, other=0),)  # type: ignore[assignment]
    return found


@triton.jit
def _slab_sums(
    x, tiles, words, scales, zeros, rows, first_slab, here, K, num_slabs, num_rows,
    BITS: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, WARPS: tl.constexpr, STEP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    """For each of COUNT `rows` [8, 1, 1] what its product with x sums up to over the last two dimensions, fp32
    [8, WARPS, 16]. first_slab [1, WARPS, 1]: every STEP-th from there on is this warp's; tiles: the words of that one.
    x, words, scales, zeros, here may differ by the warp, too. For the way of bits to numbers see packed_slab.py."""
    PER_WORD: tl.constexpr = 32 // BITS
    SLAB: tl.constexpr = 16 * PER_WORD
    SUBGROUP: tl.constexpr = PER_WORD if GROUP >= SLAB else GROUP // 16
    lane = tl.arange(0, 8)[:, None, None]
    word = tl.arange(0, 16)[None, None, :] + 0 * lane  # the same inputs for all 8
    totals = (tl.zeros([8, WARPS, 16], tl.float32),) * COUNT
    for first in range(0, num_slabs, STEP):
        # The next slab is on its way while this one is multiplied.
        slab = first + first_slab
        inside = (slab < num_slabs) & here
        next_tiles = _load_words(words, slab + STEP, rows, here, num_slabs, num_rows, COUNT)
        for subgroup in tl.static_range(PER_WORD // SUBGROUP):
            parts = (tl.zeros([8, WARPS, 16], tl.float32),) * COUNT
            inputs = tl.zeros([8, WARPS, 16], tl.float32)
            for within in tl.static_range(SUBGROUP):
                k = slab * SLAB + 16 * (subgroup * SUBGROUP + within) + word
                value = tl.load(x + k, mask=inside & (k < K), other=0.0).to(tl.float32)
                inputs += value
                first_bit = BITS * (subgroup * SUBGROUP + within)
                value *= X_SCALE / (1 << (first_bit % 16))
                new_parts = ()
                for index in tl.static_range(COUNT):
                    bits = tiles[index].to(tl.uint32, bitcast=True)  # type: ignore[var-annotated]
                    if first_bit >= 16:
                        bits = bits >> 16  # type: ignore[assignment]
                    bits = bits & (((1 << BITS) - 1) << (first_bit % 16))
                    new_parts = new_parts + (parts[index] + bits.to(tl.float32, bitcast=True) * value,)  # type: ignore[assignment]
                parts = new_parts
            group = (slab * SLAB + 16 * SUBGROUP * subgroup) // GROUP
            if not HAS_ZEROS:
                inputs *= 1 << (BITS - 1)
            new_totals = ()
            for index in tl.static_range(COUNT):
                place = group * num_rows + rows[index]
                scale = tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)
                part = parts[index] * PART_SCALE
                if HAS_ZEROS:
                    part -= tl.load(zeros + place, mask=inside, other=0).to(tl.float32) * inputs
                else:
                    part -= inputs
                new_totals = new_totals + (totals[index] + part * scale,)  # type: ignore[assignment]
            totals = new_totals
        tiles = next_tiles
    return totals


@triton.jit
def _few_up_kernel(
    x, words, scales, zeros, bias, ids, tokens, output, N, K, E, num_slabs, num_groups, num_rows, x_stride, row_step,
    up_offset, alpha, limit, NUM_CHOSEN: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, REPEATS: tl.constexpr,
    WARPS: tl.constexpr, KIND: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (REPEATS x 8 outputs, pair): activation(gate, up) of the pair's row, to output [P, N]."""
    pair = tl.program_id(1)
    if DEPENDENT:  # in this order: `_few_down_kernel` reads ids before it waits
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(ids + pair).to(tl.int64)
    if (expert >= 0) & (expert < E):
        if tl.program_id(0) == 0:
            tl.atomic_add(tokens + expert, 1)
        first = tl.program_id(0) * (8 * REPEATS)
        rows = ()
        for index in tl.static_range(2 * REPEATS):
            n = first + 8 * (index % REPEATS) + tl.arange(0, 8)[:, None, None]
            row = tl.minimum(n, N - 1) * row_step
            if index >= REPEATS:
                row += up_offset
            rows = rows + (row,)  # type: ignore[assignment]
        groups = expert * num_groups * num_rows
        own_words = words + expert * num_slabs * num_rows * 16
        slab = tl.arange(0, WARPS)[None, :, None]
        tiles = _load_words(own_words, slab, rows, True, num_slabs, num_rows, 2 * REPEATS)
        totals = _slab_sums(
            x + (pair // NUM_CHOSEN).to(tl.int64) * x_stride, tiles, own_words, scales + groups, zeros + groups, rows,
            slab, True, K, num_slabs, num_rows, BITS, GROUP, 2 * REPEATS, WARPS, WARPS, HAS_ZEROS,
        )  # fmt: skip
        for repeat in tl.static_range(REPEATS):
            n = first + 8 * repeat + tl.arange(0, 8)
            gate = tl.sum(tl.sum(totals[repeat], axis=2), axis=1)
            up = tl.sum(tl.sum(totals[REPEATS + repeat], axis=2), axis=1)
            if HAS_BIAS:
                own = bias + expert * num_rows + tl.minimum(n, N - 1) * row_step
                gate += tl.load(own).to(tl.float32)
                up += tl.load(own + up_offset).to(tl.float32)
            gated = activate(gate, up, alpha, limit, KIND)
            tl.store(output + pair.to(tl.int64) * N + n, gated.to(output.dtype.element_ty), mask=n < N)


@triton.jit
def _few_down_kernel(
    hidden, words, scales, zeros, bias, ids, weights, output, N, K, E, num_slabs, num_groups,
    NUM_CHOSEN: tl.constexpr, BLOCK_CHOSEN: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    REPEATS: tl.constexpr, WARPS: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (REPEATS x 8 outputs, token): the weighted sum over the token's experts, to output [T, N]. Its warps take
    an expert each, BLOCK_CHOSEN of them, and every so manieth slab."""
    token = tl.program_id(1).to(tl.int64)
    if DEPENDENT:
        gdc_launch_dependents()
    warp = tl.arange(0, WARPS)[None, :, None]
    index, first_slab = warp % BLOCK_CHOSEN, warp // BLOCK_CHOSEN
    pair = token * NUM_CHOSEN + tl.minimum(index, NUM_CHOSEN - 1)
    expert = tl.load(ids + pair).to(tl.int64)
    here = (expert >= 0) & (expert < E) & (index < NUM_CHOSEN)
    expert = tl.where(here, expert, 0)
    first = tl.program_id(0) * (8 * REPEATS)
    rows = ()
    for repeat in tl.static_range(REPEATS):
        rows = rows + (tl.minimum(first + 8 * repeat + tl.arange(0, 8)[:, None, None], N - 1),)  # type: ignore[assignment]
    groups = expert * num_groups * N
    own_words = words + expert * num_slabs * N * 16
    tiles = _load_words(own_words, first_slab, rows, here, num_slabs, N, REPEATS)
    if DEPENDENT:
        gdc_wait()
    share = tl.where(here, tl.load(weights + pair), 0.0)
    totals = _slab_sums(
        hidden + pair * K, tiles, own_words, scales + groups, zeros + groups, rows, first_slab, here, K, num_slabs, N,
        BITS, GROUP, REPEATS, WARPS, WARPS // BLOCK_CHOSEN, HAS_ZEROS,
    )  # fmt: skip
    for repeat in tl.static_range(REPEATS):
        n = first + 8 * repeat + tl.arange(0, 8)
        total = tl.sum(tl.sum(totals[repeat] * share, axis=2), axis=1)
        if HAS_BIAS:
            added = tl.load(bias + expert * N + rows[repeat], mask=here & (first_slab == 0), other=0.0)
            total += tl.sum(tl.sum(added.to(tl.float32) * share, axis=2), axis=1)
        tl.store(output + token * N + n, total.to(output.dtype.element_ty), mask=n < N)


@triton.jit
def _whole_slab(block, zeros, BITS: tl.constexpr, DTYPE: tl.constexpr, HAS_ZEROS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Words [R, 16] -> the integers less their zeros, in the order of the inputs, [R, 16 * 32 / BITS]. zeros [R]."""
    v = unpack_slab(block, BITS, DTYPE, ASSEMBLY)
    R: tl.constexpr = block.shape[0]
    if BITS == 4:
        low = tl.join(tl.join(v[0], v[1]), tl.join(v[2], v[3]))
        high = tl.join(tl.join(v[4], v[5]), tl.join(v[6], v[7]))
        whole = tl.reshape(tl.permute(tl.join(low, high), (0, 4, 3, 2, 1)), (R, 128))
    else:
        whole = tl.reshape(tl.permute(tl.join(tl.join(v[0], v[1]), tl.join(v[2], v[3])), (0, 3, 2, 1)), (R, 64))
    if HAS_ZEROS:
        whole -= (zeros.to(tl.float32) - (1 << (BITS - 1))).to(DTYPE)[:, None]
    return whole


@triton.jit
def _add_product(
    total, words, zeros, scales_now, row, x_rows, inside, slab, K, num_slabs, num_rows,
    BITS: tl.constexpr, GROUP: tl.constexpr, WHOLE_K: tl.constexpr, WEIGHT_LEFT: tl.constexpr, HAS_ZEROS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """total += rows of x times rows of a weight over the inputs of a slab; transposed where the weight is left.
    scales_now: of each group in the slab."""
    PER_WORD: tl.constexpr = 32 // BITS
    SLAB: tl.constexpr = 16 * PER_WORD
    SUBGROUP: tl.constexpr = PER_WORD if GROUP >= SLAB else GROUP // 16
    word = tl.arange(0, 16)
    # Unlike scales not a slab ahead: carried over they have another layout, and all of the weight changed its own.
    zeros_now = scales_now
    if HAS_ZEROS:
        zeros_now = load_groups(zeros, slab, num_slabs, row, num_rows, BITS, GROUP, SUBGROUP)
    block = tl.load(words + slab * num_rows * 16 + row[:, None] * 16 + word[None, :])
    if WEIGHT_LEFT:
        values = ()
        for place in tl.static_range(PER_WORD):
            k = slab * SLAB + 16 * place + word
            mask = inside[None, :] if WHOLE_K else inside[None, :] & (k < K)[:, None]
            values = values + (tl.load(x_rows[None, :] + k[:, None], mask=mask, other=0.0),)  # type: ignore[assignment]
        total = add_slab(total, block, values, scales_now, zeros_now, BITS, SUBGROUP, HAS_ZEROS, ASSEMBLY)
    else:  # a group holds the slab
        k = slab * SLAB + tl.arange(0, SLAB)
        mask = inside[:, None] if WHOLE_K else inside[:, None] & (k < K)[None, :]
        left = tl.load(x_rows[:, None] + k[None, :], mask=mask, other=0.0)
        right = _whole_slab(block, zeros_now[0], BITS, left.dtype, HAS_ZEROS, ASSEMBLY)
        total += tl.dot(left, right.T, input_precision="ieee") * scales_now[0].to(tl.float32)[None, :]
    return total


@triton.jit
def _grouped_kernel(
    x, words, scales, zeros, bias, output, pairs, experts, starts, counts,
    N, K, num_slabs, num_groups, num_rows, x_stride, row_step, up_offset, alpha, limit,
    BITS: tl.constexpr, GROUP: tl.constexpr, DIVISOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WHOLE_K: tl.constexpr, KIND: tl.constexpr, WEIGHT_LEFT: tl.constexpr, HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr, ASSEMBLY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program: a block of pairs and a tile of outputs, to output [P, N]. DIVISOR: a pair's row of x is pair //
    DIVISOR."""
    PER_WORD: tl.constexpr = 32 // BITS
    SUBGROUP: tl.constexpr = PER_WORD if GROUP >= 16 * PER_WORD else GROUP // 16
    num_tiles = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) // num_tiles
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.load(experts + block).to(tl.int64)
    if expert >= 0:
        inside, pair = pairs_of_block(pairs, starts, counts, block, BLOCK_M)
        n = tl.program_id(0) % num_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.minimum(n, N - 1) * row_step
        x_rows = x + pair // DIVISOR * x_stride
        own_words = words + expert * num_slabs * num_rows * 16
        own_scales = scales + expert * num_groups * num_rows
        own_zeros = zeros + expert * num_groups * num_rows
        if WEIGHT_LEFT:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            total_up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            total_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        row_up = row + up_offset
        # Scales are too small for asynchronous copies, and here a slab is done sooner than they come.
        AHEAD: tl.constexpr = 1 if WEIGHT_LEFT else 0
        scales_now = load_groups(own_scales, 0, num_slabs, row, num_rows, BITS, GROUP, SUBGROUP)
        scales_up = scales_now
        if KIND != 0:
            scales_up = load_groups(own_scales, 0, num_slabs, row_up, num_rows, BITS, GROUP, SUBGROUP)
        for slab in tl.range(0, num_slabs, num_stages=STAGES):
            next_scales = load_groups(own_scales, slab + AHEAD, num_slabs, row, num_rows, BITS, GROUP, SUBGROUP)
            next_up = next_scales
            if KIND != 0:
                next_up = load_groups(own_scales, slab + AHEAD, num_slabs, row_up, num_rows, BITS, GROUP, SUBGROUP)
            if AHEAD == 0:
                scales_now = next_scales
                scales_up = next_up
            total = _add_product(
                total, own_words, own_zeros, scales_now, row, x_rows, inside, slab, K, num_slabs, num_rows, BITS, GROUP,
                WHOLE_K, WEIGHT_LEFT, HAS_ZEROS, ASSEMBLY,
            )  # fmt: skip
            if KIND != 0:
                total_up = _add_product(
                    total_up, own_words, own_zeros, scales_up, row_up, x_rows, inside, slab, K, num_slabs, num_rows,
                    BITS, GROUP, WHOLE_K, WEIGHT_LEFT, HAS_ZEROS, ASSEMBLY,
                )  # fmt: skip
            scales_now = next_scales
            scales_up = next_up
        finish_block(
            output, bias + expert * num_rows + row, total, total_up, pair, inside, n, N, up_offset, alpha, limit, KIND,
            WEIGHT_LEFT, HAS_BIAS,
        )  # fmt: skip


def few_up(x: torch.Tensor, matrix: PackedExpertWeight, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """x [T, K], ids [T, k] -> activation(gate, up) of each pair whose expert is here, [P, N]. Counts them in tokens."""
    assert matrix.kind != 0, "a product with a gate"
    num_pairs, num_chosen, size = ids.numel(), ids.shape[1], matrix.num_outputs
    output = torch.empty(num_pairs, size, dtype=x.dtype, device=x.device)
    repeats, warps = _UP_CUT
    _few_up_kernel[(triton.cdiv(size, 8 * repeats), num_pairs)](
        x, *_held(matrix, x), ids, tokens, output, size, matrix.num_inputs, len(tokens), *matrix.sizes, x.stride(0),
        matrix.row_step, matrix.up_offset, matrix.alpha, matrix.limit, NUM_CHOSEN=num_chosen, REPEATS=repeats,
        WARPS=warps, KIND=matrix.kind, num_warps=warps, **_options(matrix, x),
    )  # fmt: skip
    return output


def few_down(
    hidden: torch.Tensor, matrix: PackedExpertWeight, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """hidden [P, K], ids and weights fp32 [T, k] -> the weighted sum of each token's experts that are here, [T, N]."""
    num_tokens, num_chosen = ids.shape
    size, (num_slabs, num_groups, _) = matrix.num_outputs, matrix.sizes
    output = torch.empty(num_tokens, size, dtype=hidden.dtype, device=hidden.device)
    repeats, warps = _DOWN_CUT
    block_chosen = triton.next_power_of_2(num_chosen)
    warps = max(warps, block_chosen)
    _few_down_kernel[(triton.cdiv(size, 8 * repeats), num_tokens)](
        hidden, *_held(matrix, hidden), ids, weights, output, size, matrix.num_inputs, matrix.num_experts, num_slabs,
        num_groups, NUM_CHOSEN=num_chosen, BLOCK_CHOSEN=block_chosen, REPEATS=repeats, WARPS=warps,
        num_warps=min(16, warps), **_options(matrix, hidden),
    )  # fmt: skip
    return output


def grouped_matmul(
    x: torch.Tensor,
    matrix: PackedExpertWeight,
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
    slab = slab_inputs(matrix.bits)
    assert tiles.weight_left or matrix.has_whole_slabs, "of smaller groups the weight is left"
    _grouped_kernel[(len(order.experts) * triton.cdiv(size, tiles.block_n),)](
        x, *_held(matrix, x), output, order.pairs, order.experts, order.starts, order.counts, size, inputs,
        *matrix.sizes, x.stride(0), matrix.row_step, matrix.up_offset, matrix.alpha, matrix.limit,
        DIVISOR=divisor, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, WHOLE_K=inputs % slab == 0,
        KIND=matrix.kind, WEIGHT_LEFT=tiles.weight_left, ASSEMBLY=x.device.type == "cuda", STAGES=tiles.num_stages,
        num_warps=tiles.num_warps, **_options(matrix, x),
    )  # fmt: skip
    return output


def _held(matrix: PackedExpertWeight, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    zeros, bias = matrix.zeros, matrix.bias
    return matrix.words, matrix.scales, matrix.scales if zeros is None else zeros, x if bias is None else bias


def _options(matrix: PackedExpertWeight, x: torch.Tensor) -> dict[str, int | bool]:
    return {
        "BITS": matrix.bits, "GROUP": matrix.group_size, "HAS_ZEROS": matrix.zeros is not None,
        "HAS_BIAS": matrix.bias is not None, "DEPENDENT": has_dependent_launch(x.device), **launch_options(x.device),
    }  # fmt: skip
