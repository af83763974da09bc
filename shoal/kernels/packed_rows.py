"""One to eight rows times integers of 4 or 8 bits in groups with a scale each: the matrix units, fed by hand.

M rows of x, N outputs, K inputs; the weight is a `PackedWeight`. One instruction multiplies 16 outputs by 8 rows over
16 inputs (PTX `mma.m16n8k16`), and any order of the inputs is right as long as both operands have it. So a thread masks
the words that it loaded, and these are its part of the operand: nothing is exchanged, and one operation serves two
weights. A number of fp16 or bf16 whose bits are an integer v is v times the smallest one of its type, as long as v is
below two units of the exponent; the matrix units take such numbers as they are, and in bf16 x times 2^64 brings the
products back to where fp32 is exact. x is brought into that form once, by the norm before the product
(`norm_for_rows`), or where there is none by each program for itself. Called through kernels/packed_linear.py.

A tensor [8, WARPS, 16] here is four registers a thread: in a warp 4 threads share each of 8 outputs, with 4 words each.
The kernel is right only if the compiler lays it out so: `packed_tuning` compares before it takes it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoal.kernels.epilogue import finish
from shoal.kernels.launch import has_dependent_launch, launch_options
from shoal.kernels.packed_weight import PackedWeight, prefetch, slab_inputs

MOST_ROWS = 8
# Of the product: bits of a fp16 are units of 2^-24; of a bf16 2^-133, and x is 2^64 times too large.
_FP16_UNITS, _BF16_UNITS = 2.0**24, 2.0**69
_UNIT_FP16, _UNIT_BF16 = tl.constexpr(_FP16_UNITS), tl.constexpr(_BF16_UNITS)


def _masks(bits: int, is_bf16: bool) -> list[tuple[int, int, int]]:
    """For each pair of places of a word (of its lower and its upper half): (shift, mask, doublings of the integer)."""
    if bits == 8:
        return [(0, 0x00FF00FF, 0), (8, 0x00FF00FF, 0)]
    if is_bf16:
        return [(0, 0x000F000F, 0), (0, 0x00F000F0, 4), (8, 0x000F000F, 0), (8, 0x00F000F0, 4)]
    return [(4 * place, 0x000F000F, 0) for place in range(4)]


def _factor(is_bf16: bool, doublings: int) -> float:
    """By what x is multiplied before a product with integers that are `doublings` too large."""
    return 2.0 ** (64 - doublings) if is_bf16 else 1.0


def _inputs_assembly(bits: int, is_bf16: bool) -> str:
    """x of all places of 4 words -> for each pair of places of each word: both x in a register."""
    masks = _masks(bits, is_bf16)
    pairs = len(masks)
    lines = [".reg .b32 factor, zero;", "mov.b32 zero, 0x80008000;"]
    for pair, (_, _, doublings) in enumerate(masks):
        if is_bf16:
            factor = (127 + int(math.log2(_factor(is_bf16, doublings)))) << 7
            lines.append(f"mov.b32 factor, {factor << 16 | factor:#010x};")
        for word in range(4):
            low, high = (4 * pairs + 2 * (pair + half * pairs) + word // 2 for half in (0, 1))
            output = f"${4 * pair + word}"
            lines.append(f"prmt.b32 {output}, ${low}, ${high}, {'0x7632' if word % 2 else '0x5410'};")
            if is_bf16:
                lines.append(f"fma.rn.bf16x2 {output}, {output}, factor, zero;")
    return "{ " + " ".join(lines) + " }"


def _product_assembly(bits: int, is_bf16: bool) -> str:
    """4 words of an output and of the eighth one after it, pairs of x -> four sums, of words 0 and 1, and 2 and 3."""
    kind = "bf16" if is_bf16 else "f16"
    lines = [".reg .b32 a<4>, s<4>;", ".reg .f32 c<8>;"]
    for first in (0, 2):
        sums = "{" + ", ".join(f"c{2 * first + index}" for index in range(4)) + "}"
        before = "{0f00000000, 0f00000000, 0f00000000, 0f00000000}"
        words = [f"${4 + first}", f"${8 + first}", f"${5 + first}", f"${9 + first}"]
        shifted, source = 0, words
        for pair, (shift, mask, _) in enumerate(_masks(bits, is_bf16)):
            if shift != shifted:
                lines += [f"shr.u32 s{index}, {word}, {shift};" for index, word in enumerate(words)]
                shifted, source = shift, [f"s{index}" for index in range(4)]
            lines += [f"and.b32 a{index}, {word}, {mask:#010x};" for index, word in enumerate(source)]
            x = f"{{${12 + 4 * pair + first}, ${13 + 4 * pair + first}}}"
            lines.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {sums}, {{a0, a1, a2, a3}}, {x}, {before};"
            )
            before = sums
    lines += [f"add.f32 ${index}, c{index}, c{4 + index};" for index in range(4)]
    return "{ " + " ".join(lines) + " }"


def _constraints(outputs: str, num_outputs: int, num_inputs: int) -> str:
    return ",".join([outputs] * num_outputs + ["r"] * num_inputs)


_INPUTS_4_BF16, _INPUTS_4_FP16 = tl.constexpr(_inputs_assembly(4, True)), tl.constexpr(_inputs_assembly(4, False))
_INPUTS_8_BF16, _INPUTS_8_FP16 = tl.constexpr(_inputs_assembly(8, True)), tl.constexpr(_inputs_assembly(8, False))
_PRODUCT_4_BF16, _PRODUCT_4_FP16 = tl.constexpr(_product_assembly(4, True)), tl.constexpr(_product_assembly(4, False))
_PRODUCT_8_BF16, _PRODUCT_8_FP16 = tl.constexpr(_product_assembly(8, True)), tl.constexpr(_product_assembly(8, False))
_INPUTS_4, _INPUTS_8 = tl.constexpr(_constraints("=&r", 16, 16)), tl.constexpr(_constraints("=&r", 8, 8))
_PRODUCT_4, _PRODUCT_8 = tl.constexpr(_constraints("=&f", 4, 24)), tl.constexpr(_constraints("=&f", 4, 16))
_FOUR, _TWO = tl.constexpr((tl.int32,) * 4), tl.constexpr((tl.int32,) * 2)


@triton.jit
def _load_words(words, slab, step, outputs, COUNT: tl.constexpr):
    """Of each of `outputs` [8, 1, 1] the words of its slab [8, WARPS, 16]."""
    word = tl.arange(0, 16)[None, None, :]
    found = ()
    for index in tl.static_range(COUNT):
        found = found + (tl.load(words + slab * step + outputs[index] * 16 + word),)  # type: ignore[assignment]
    return found


@triton.jit
def _load_rows(x_row, slab, K, BITS: tl.constexpr, WHOLE_K: tl.constexpr):
    """For each place in a word those inputs of the slabs [8, WARPS, 16]: row i of x for the output i."""
    word = tl.arange(0, 16)[None, None, :]
    found = ()
    for place in tl.static_range(32 // BITS):
        k = slab * (16 * (32 // BITS)) + 16 * place + word
        if WHOLE_K:
            value = tl.load(x_row + k)
        else:
            value = tl.load(x_row + k, mask=k < K, other=0.0)
        found = found + (value,)  # type: ignore[assignment]
    return found


@triton.jit
def _load_pairs(pairs, slab, row, M, BITS: tl.constexpr):
    """What `_paired_inputs` makes, where `norm_for_rows` has made it: for each pair of places [8, WARPS, 16]."""
    word = tl.arange(0, 16)[None, None, :]
    found = ()
    for pair in tl.static_range(16 // BITS):
        place = pairs + (slab * M + row) * (16 * (16 // BITS)) + 16 * pair + word
        found = found + (tl.load(place),)  # type: ignore[assignment]
    return found


@triton.jit(do_not_specialize=["M"])
def _norm_for_rows_kernel(
    x, weight, pairs, sums, M, K, x_stride, eps,
    BITS: tl.constexpr, SLABS: tl.constexpr, FACTOR: tl.constexpr, ODD_FACTOR: tl.constexpr, UNIT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program m: a row. A place of `pairs` holds two inputs, of the lower and of the upper half of a word."""
    PAIRS: tl.constexpr = 16 // BITS
    m = tl.program_id(0)
    slab = tl.arange(0, SLABS)[:, None]
    place = tl.arange(0, 16 * PAIRS)[None, :]
    low = slab * (32 * PAIRS) + place
    high = low + 16 * PAIRS
    if DEPENDENT:
        gdc_launch_dependents()
    low_scale = tl.load(weight + low, mask=low < K, other=0.0).to(tl.float32)
    high_scale = tl.load(weight + high, mask=high < K, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_wait()
    row = x + m.to(tl.int64) * x_stride
    low_value = tl.load(row + low, mask=low < K, other=0.0).to(tl.float32)
    high_value = tl.load(row + high, mask=high < K, other=0.0).to(tl.float32)
    squares = tl.sum(tl.sum(low_value * low_value + high_value * high_value, axis=1), axis=0)
    inverse = tl.rsqrt(squares / K + eps)
    TYPE: tl.constexpr = x.dtype.element_ty
    low_value = (low_value * inverse * low_scale).to(TYPE).to(tl.float32)
    high_value = (high_value * inverse * high_scale).to(TYPE).to(tl.float32)
    factor = tl.where(place // 16 % 2 == 0, FACTOR, ODD_FACTOR)
    low_bits = (low_value * factor).to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high_bits = (high_value * factor).to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16
    inside = slab < tl.cdiv(K, 32 * PAIRS)
    tl.store(pairs + (slab * M + m) * (16 * PAIRS) + place, low_bits | high_bits, mask=inside & (place >= 0))
    # Where `rows_kernel` has this row's sums.
    total = tl.sum(low_value + high_value, axis=1)[:, None] * UNIT
    own = m // 2 * 4 + m % 2 + 2 * tl.arange(0, 2)[None, :]
    tl.store(sums + slab * 16 + own, total + 0.0 * own, mask=inside & (own >= 0))


def norm_for_rows(
    x: torch.Tensor, weight: PackedWeight, norm_weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The RMSNorm of x [M, K], as `rows_kernel` takes it with PREPARED: (int32 [slabs, M, words of a slab], sums of the
    slabs' inputs fp32 [slabs, 16])."""
    num_rows, num_inputs = x.shape
    assert num_rows <= MOST_ROWS
    num_slabs, num_pairs = weight.words.shape[0], 16 // weight.bits
    pairs = torch.empty(num_slabs, num_rows, 16 * num_pairs, dtype=torch.int32, device=x.device)
    sums = torch.empty(num_slabs, 16, dtype=torch.float32, device=x.device)
    is_bf16 = x.dtype is torch.bfloat16
    doublings = [each[2] for each in _masks(weight.bits, is_bf16)]
    on_gpu = x.device.type == "cuda"
    assert num_slabs * slab_inputs(weight.bits) >= num_inputs
    _norm_for_rows_kernel[(num_rows,)](
        x, norm_weight, pairs, sums, num_rows, num_inputs, x.stride(0), eps,
        BITS=weight.bits, SLABS=triton.next_power_of_2(num_slabs),
        FACTOR=_factor(is_bf16, doublings[0]), ODD_FACTOR=_factor(is_bf16, doublings[1]),
        UNIT=1.0 / (_BF16_UNITS if is_bf16 else _FP16_UNITS) if on_gpu else 1.0,
        DEPENDENT=has_dependent_launch(x.device), num_warps=8, **launch_options(x.device),
    )  # fmt: skip
    return pairs, sums


@triton.jit
def _load_scales(scales, slab, inside, stride, outputs, COUNT: tl.constexpr, SLAB: tl.constexpr, GROUP: tl.constexpr):
    """For each 16 outputs those of their sums [8, WARPS, 16] (see `rows_kernel`), 0 where not `inside`."""
    group = ((slab * SLAB) // GROUP).to(tl.int64)
    is_second = tl.arange(0, 16)[None, None, :] % 4 >= 2
    found = ()
    for index in tl.static_range(COUNT // 2):
        first = tl.load(scales + group * stride + outputs[2 * index], mask=inside, other=0).to(tl.float32)
        second = tl.load(scales + group * stride + outputs[2 * index + 1], mask=inside, other=0).to(tl.float32)
        found = found + (tl.where(is_second, second, first),)  # type: ignore[assignment]
    return found


@triton.jit
def _paired_inputs(values, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """x as the products take it; the interpreter has no assembly."""
    if not ASSEMBLY:
        return values
    elif BITS == 4:
        v = values
        if v[0].dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                _INPUTS_4_BF16, _INPUTS_4, [v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]], _FOUR, is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(
                _INPUTS_4_FP16, _INPUTS_4, [v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]], _FOUR, is_pure=True, pack=4
            )
    else:
        v = values
        if v[0].dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                _INPUTS_8_BF16, _INPUTS_8, [v[0], v[1], v[2], v[3]], _TWO, is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(
                _INPUTS_8_FP16, _INPUTS_8, [v[0], v[1], v[2], v[3]], _TWO, is_pure=True, pack=4
            )


@triton.jit
def _sums_of_inputs(words, pairs, IS_BF16: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Of a slab, in units, [8, WARPS, 16]: the product with a one in each place. words: of any tile."""
    ones = tl.full(words.shape, 0x11111111 if BITS == 4 else 0x01010101, tl.int32)
    return _product(ones, ones, pairs, IS_BF16, BITS, ASSEMBLY)


@triton.jit
def _unpaired(pairs, BITS: tl.constexpr):
    """For each place x in fp16, of pairs: for the interpreter."""
    found = ()
    for half in tl.static_range(2):
        for pair in tl.static_range(16 // BITS):
            bits = (pairs[pair] >> (16 * half)).to(tl.int16)
            found = found + (bits.to(tl.float16, bitcast=True),)  # type: ignore[assignment]
    return found


@triton.jit
def _plain(words, values, BITS: tl.constexpr):
    """[8, WARPS, 8]: the 8 outputs' integers times the 8 rows."""
    total = tl.zeros([8, words.shape[1], 8], tl.float32)
    for place in tl.static_range(32 // BITS):
        integers = ((words >> (BITS * place)) & ((1 << BITS) - 1)).to(tl.float32)
        x = tl.permute(values[place].to(tl.float32), [1, 0, 2])
        total += tl.sum(integers[:, :, None, :] * x[None, :, :, :], axis=3)
    return total


@triton.jit
def _product(first, second, x, IS_BF16: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The integers of 8 outputs and of the next 8 times all rows, in units, [8, WARPS, 16]: where `own` and `m` of
    `rows_kernel` say."""
    if not ASSEMBLY:
        both = tl.join(_plain(first, x, BITS), _plain(second, x, BITS))
        both = tl.permute(tl.reshape(both, [8, first.shape[1], 4, 2, 2]), [0, 1, 2, 4, 3])
        return tl.reshape(both, [8, first.shape[1], 16])
    elif BITS == 4:
        if IS_BF16:
            return tl.inline_asm_elementwise(
                _PRODUCT_4_BF16, _PRODUCT_4, [first, second, x[0], x[1], x[2], x[3]], tl.float32, is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(
                _PRODUCT_4_FP16, _PRODUCT_4, [first, second, x[0], x[1], x[2], x[3]], tl.float32, is_pure=True, pack=4
            )
    else:
        if IS_BF16:
            return tl.inline_asm_elementwise(
                _PRODUCT_8_BF16, _PRODUCT_8, [first, second, x[0], x[1]], tl.float32, is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(
                _PRODUCT_8_FP16, _PRODUCT_8, [first, second, x[0], x[1]], tl.float32, is_pure=True, pack=4
            )


@triton.jit
def _prefetch_later(words, slab, end, step, first, N, WARPS: tl.constexpr, HALVES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ask the slabs from `slab` on into L2, a thread for each warp's and half."""
    thread = tl.arange(0, 32 * WARPS)
    own = slab + thread % WARPS
    half = thread // WARPS
    asked = (half < HALVES) & (own < end)
    address = words + own * step + (first + half * N) * 16
    num_bytes = tl.minimum(BLOCK_N, N - first) * 64
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r,r",
        [address, num_bytes, asked.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _add_slab(
    totals, tiles, pairs, inputs, factors, offsets,
    COUNT: tl.constexpr, IS_BF16: tl.constexpr, BITS: tl.constexpr, HAS_ZEROS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """The sums of COUNT x 16 outputs with those of a slab, in units. inputs: the sums of its inputs, likewise."""
    if not HAS_ZEROS:
        inputs *= 1 << (BITS - 1)
    found = ()
    for index in tl.static_range(COUNT):
        part = _product(tiles[2 * index], tiles[2 * index + 1], pairs, IS_BF16, BITS, ASSEMBLY)
        if HAS_ZEROS:
            part -= offsets[index] * inputs
        else:
            part -= inputs
        found = found + (totals[index] + part * factors[index],)  # type: ignore[assignment]
    return found


@triton.jit(do_not_specialize=["M", "num_slabs", "num_splits", "split_slabs", "prefetch_slabs"])
def rows_kernel(
    x, sums, words, scales, zeros, bias, residual, y, partial, counters,
    M, N, K, num_slabs, num_splits, split_slabs, x_stride, y_stride, residual_stride, prefetch_slabs,
    BITS: tl.constexpr, GROUP: tl.constexpr, REPEATS: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
    PREFETCHES: tl.constexpr, MOST_SPLITS: tl.constexpr, WHOLE_K: tl.constexpr, GATED: tl.constexpr,
    HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DEPENDENT: tl.constexpr,
    PREPARED: tl.constexpr, IS_BF16: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Program (outputs, split): REPEATS x 16 outputs; a warp takes every WARPS-th slab. AHEAD: how many slabs are on
    their way to registers while one is multiplied, 1 or 2. PREFETCHES: more are on their way to L2. PREPARED: x and
    sums are what `norm_for_rows` makes."""
    HALVES: tl.constexpr = 2 if GATED else 1
    COUNT: tl.constexpr = 2 * HALVES * REPEATS
    SLAB: tl.constexpr = 16 * (32 // BITS)
    BLOCK_N: tl.constexpr = 16 * REPEATS
    tile, split = tl.program_id(0), tl.program_id(1)
    begin = split * split_slabs
    end = tl.minimum(begin + split_slabs, num_slabs)
    warp = tl.arange(0, WARPS)[None, :, None]
    eight = tl.arange(0, 8)[:, None, None]
    total_outputs = N * HALVES
    outputs = ()
    for half in tl.static_range(HALVES):
        for eighth in tl.static_range(2 * REPEATS):
            n = tl.minimum(tile * BLOCK_N + 8 * eighth + eight, N - 1) + half * N
            outputs = outputs + (n,)  # type: ignore[assignment]
    step = total_outputs.to(tl.int64) * 16
    if DEPENDENT:
        gdc_launch_dependents()
        prefetch(words, begin, end, step, tile * BLOCK_N, N, prefetch_slabs, 32 * WARPS, BLOCK_N)
        if GATED:
            prefetch(words + N * 16, begin, end, step, tile * BLOCK_N, N, prefetch_slabs, 32 * WARPS, BLOCK_N)
    last = end - 1  # what lies behind is loaded again, and scaled by 0
    slab = begin + warp
    tiles = _load_words(words, tl.minimum(slab, last), step, outputs, COUNT)
    soon = tiles
    if AHEAD == 2:
        soon = _load_words(words, tl.minimum(slab + WARPS, last), step, outputs, COUNT)
    own, is_slab = tl.minimum(slab, last), slab < end
    factors = _load_scales(scales, own, is_slab, total_outputs, outputs, COUNT, SLAB, GROUP)
    offsets = factors
    if HAS_ZEROS:
        offsets = _load_scales(zeros, own, is_slab, total_outputs, outputs, COUNT, SLAB, GROUP)
    if DEPENDENT:
        gdc_wait()
    row = tl.minimum(eight, M - 1)
    x_row = x + row * x_stride
    sum_place = sums + tl.arange(0, 16)[None, None, :] + 0 * eight
    if PREPARED:
        values = _load_pairs(x, own, row, M, BITS)
        inputs = tl.load(sum_place + own * 16)
    else:
        values = _load_rows(x_row, own, K, BITS, WHOLE_K)
        inputs = factors[0]
    totals = (tl.zeros([8, WARPS, 16], tl.float32),) * (HALVES * REPEATS)
    for first in range(begin, end, WARPS):
        if DEPENDENT and PREFETCHES:
            _prefetch_later(words, first + 2 * WARPS, end, step, tile * BLOCK_N, N, WARPS, HALVES, BLOCK_N)
        slab = first + WARPS + warp
        own, is_slab = tl.minimum(slab, last), slab < end
        later = _load_words(words, tl.minimum(slab + (AHEAD - 1) * WARPS, last), step, outputs, COUNT)
        next_inputs = inputs
        if PREPARED:
            next_values = _load_pairs(x, own, row, M, BITS)
            next_inputs = tl.load(sum_place + own * 16)
        else:
            next_values = _load_rows(x_row, own, K, BITS, WHOLE_K)
        next_factors = _load_scales(scales, own, is_slab, total_outputs, outputs, COUNT, SLAB, GROUP)
        next_offsets = next_factors
        if HAS_ZEROS:
            next_offsets = _load_scales(zeros, own, is_slab, total_outputs, outputs, COUNT, SLAB, GROUP)
        if not PREPARED:
            pairs = _paired_inputs(values, BITS, ASSEMBLY)
            inputs = _sums_of_inputs(tiles[0], pairs, IS_BF16, BITS, ASSEMBLY)
        elif ASSEMBLY:
            pairs = values
        else:
            pairs = _unpaired(values, BITS)
        totals = _add_slab(
            totals, tiles, pairs, inputs, factors, offsets, HALVES * REPEATS, IS_BF16, BITS, HAS_ZEROS, ASSEMBLY
        )  # fmt: skip
        if AHEAD == 2:
            tiles = soon
            soon = later
        else:
            tiles = later
        values = next_values
        inputs = next_inputs
        factors = next_factors
        offsets = next_offsets
    unit = 1.0
    if ASSEMBLY:
        unit = _UNIT_BF16 if IS_BF16 else _UNIT_FP16
    word = tl.arange(0, 16)[None, :]
    within = tl.arange(0, 8)[:, None] + 8 * (word % 4 // 2)
    m = word // 4 * 2 + word % 2 + 0 * within
    if MOST_SPLITS == 1:
        for repeat in tl.static_range(REPEATS):
            n = tile * BLOCK_N + 16 * repeat + within
            acc = tl.sum(totals[repeat], axis=1) * unit
            up = acc
            if GATED:
                up = tl.sum(totals[REPEATS + repeat], axis=1) * unit
            finish(
                y, bias, residual, m, n, acc, up, (n < N) & (m < M), N, y_stride, residual_stride,
                GATED, HAS_BIAS, HAS_RESIDUAL,
            )  # fmt: skip
    else:
        # Everyone leaves its summand; who comes last adds all of them, in the order of the splits.
        for index in tl.static_range(HALVES * REPEATS):
            n = tile * BLOCK_N + 16 * (index % REPEATS) + within
            place = partial + (split * HALVES + index // REPEATS) * M * N + m * N + n
            tl.store(place, tl.sum(totals[index], axis=1) * unit, mask=(n < N) & (m < M))
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == num_splits - 1:
            for repeat in tl.static_range(REPEATS):
                n = tile * BLOCK_N + 16 * repeat + within
                inside = (n < N) & (m < M)
                acc = tl.zeros([8, 16], tl.float32)
                up = acc
                for other in tl.static_range(MOST_SPLITS):
                    from_split = partial + other * HALVES * M * N + m * N + n
                    there = inside & (other < num_splits)
                    acc += tl.load(from_split, mask=there, other=0.0, cache_modifier=".cg")
                    if GATED:
                        up += tl.load(from_split + M * N, mask=there, other=0.0, cache_modifier=".cg")
                finish(
                    y, bias, residual, m, n, acc, up, inside, N, y_stride, residual_stride,
                    GATED, HAS_BIAS, HAS_RESIDUAL,
                )  # fmt: skip
            tl.store(counters + tile, 0)
