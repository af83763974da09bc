"""Linear layers whose weight is integers of 4 or 8 bits in groups with a scale each (GPTQ, AWQ): the product.

M rows of x, N outputs, K inputs; the weight is a `PackedWeight`. `rows_kernel` (packed_rows.py): up to 8 rows, where a
group holds whole slabs. `_sum_kernel`: one row, by the plain units, with smaller groups too. `_dot_kernel`: 1 to 64
rows a program by the matrix units. None rounds a weight: integers are exact in fp16 and
bf16, scales act on sums in fp32. Called through kernels/packed_tuning.py.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoal.kernels.epilogue import finish
from shoal.kernels.launch import has_dependent_launch, launch_options
from shoal.kernels.linear import MOST_SPLITS, Workspace
from shoal.kernels.packed_rows import MOST_ROWS, norm_for_rows, rows_kernel
from shoal.kernels.packed_slab import PART_SCALE, X_SCALE, add_slab, load_groups
from shoal.kernels.packed_weight import WORDS, PackedWeight, prefetch, slab_inputs

MOST_DOT_ROWS = 64  # of a program: 128 leave one to a processor, which waits for its own loads
# What a product asks into L2 while the one before it still runs.
_PREFETCHED_BYTES = 6 << 20


@dataclasses.dataclass(frozen=True)
class PackedConfig:
    """How a product is cut. kind: "rows" (up to 8 rows, see packed_rows.py; block_n a multiple of 16, num_stages and
    prefetches: what is on its way) or "sum" (one row; block_n a multiple of 8), in both a warp takes every
    num_warps-th slab; or "dot". takes_norm: a norm before it is part of it ("sum" with one split), or leaves x as it
    is multiplied ("rows"), rather than a kernel of its own."""

    kind: str
    block_n: int
    num_warps: int
    num_stages: int = 1
    num_splits: int = 1
    takes_norm: bool = False
    prefetches: bool = False

    @property
    def label(self) -> str:
        """What stands for it in files."""
        cut = f"{self.kind} {self.block_n} warps={self.num_warps} stages={self.num_stages} splits={self.num_splits}"
        return f"{cut}{' norm' * self.takes_norm}{' prefetches' * self.prefetches}"


@triton.jit
def _load_inputs(
    x, slab, end, K, BITS: tl.constexpr, WARPS: tl.constexpr, WHOLE_K: tl.constexpr, IS_NEEDED: tl.constexpr
):  # fmt: skip
    """For each place in a word, those inputs of the slabs [8, WARPS, 16], the same for all 8 lanes."""
    found = ()
    if IS_NEEDED:
        lane = tl.arange(0, 8)[:, None, None]
        word = tl.arange(0, 16)[None, None, :]
        for place in tl.static_range(32 // BITS):
            k = slab * (16 * (32 // BITS)) + 16 * place + word + 0 * lane
            inside = (slab + 0 * (lane + word)) < end
            if not WHOLE_K:
                inside = inside & (k < K)
            found = found + (tl.load(x + k, mask=inside, other=0.0),)  # type: ignore[assignment]
    return found


@triton.jit(do_not_specialize=["num_splits", "prefetch_slabs"])
def _sum_kernel(
    x, words, scales, zeros, bias, residual, norm, y, partial, counters,
    N, K, num_slabs, num_splits, split_slabs, eps, prefetch_slabs,
    BITS: tl.constexpr, GROUP: tl.constexpr, REPEATS: tl.constexpr, WARPS: tl.constexpr, MOST_SPLITS: tl.constexpr,
    WHOLE_K: tl.constexpr, GATED: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One row. A program owns REPEATS x 8 outputs. In a warp 4 lanes hold an output's slab, 16 bytes each."""
    HALVES: tl.constexpr = 2 if GATED else 1
    PER_WORD: tl.constexpr = 32 // BITS
    SLAB: tl.constexpr = 16 * PER_WORD
    SUBGROUP: tl.constexpr = PER_WORD if GROUP >= SLAB else GROUP // 16
    tile = tl.program_id(0)
    split = tl.program_id(1)
    begin = split * split_slabs
    end = tl.minimum(begin + split_slabs, num_slabs)
    warp = tl.arange(0, WARPS)[None, :, None]
    lane = tl.arange(0, 8)[:, None, None]
    word = tl.arange(0, 16)[None, None, :]
    total_outputs = N * HALVES
    outputs = ()
    for half in tl.static_range(HALVES):
        for repeat in tl.static_range(REPEATS):
            n = tl.minimum(tile * (8 * REPEATS) + 8 * repeat + lane, N - 1) + half * N
            outputs = outputs + (n,)  # type: ignore[assignment]
    step = total_outputs.to(tl.int64) * 16
    if DEPENDENT:
        gdc_launch_dependents()
        first_output = tile * (8 * REPEATS)
        prefetch(words, begin, end, step, first_output, N, prefetch_slabs, 32 * WARPS, 8 * REPEATS)
        if GATED:
            prefetch(words + N * 16, begin, end, step, first_output, N, prefetch_slabs, 32 * WARPS, 8 * REPEATS)
    slab = begin + warp
    tiles = ()
    for index in tl.static_range(HALVES * REPEATS):
        address = words + slab * step + outputs[index] * 16 + word
        tiles = tiles + (tl.load(address, mask=slab < end, other=0),)  # type: ignore[assignment]
    if DEPENDENT:
        gdc_wait()
    values = _load_inputs(x, slab, end, K, BITS, WARPS, WHOLE_K, True)
    totals = (tl.zeros([8, WARPS, 16], tl.float32),) * (HALVES * REPEATS)
    squares = tl.zeros([8, WARPS, 16], tl.float32)
    for first in range(begin, end, WARPS):
        # The next slab is on its way while this one is multiplied.
        slab = first + warp
        later = slab + WARPS
        next_tiles = ()
        for index in tl.static_range(HALVES * REPEATS):
            address = words + later * step + outputs[index] * 16 + word
            next_tiles = next_tiles + (tl.load(address, mask=later < end, other=0),)  # type: ignore[assignment]
        next_values = _load_inputs(x, later, end, K, BITS, WARPS, WHOLE_K, True)
        factors = _load_inputs(norm, slab, end, K, BITS, WARPS, WHOLE_K, HAS_NORM)
        for subgroup in tl.static_range(PER_WORD // SUBGROUP):
            parts = (tl.zeros([8, WARPS, 16], tl.float32),) * (HALVES * REPEATS)
            inputs = tl.zeros([8, WARPS, 16], tl.float32)
            for within in tl.static_range(SUBGROUP):
                value = values[subgroup * SUBGROUP + within].to(tl.float32)
                if HAS_NORM:
                    squares += value * value
                    value *= factors[subgroup * SUBGROUP + within].to(tl.float32)
                inputs += value
                first_bit = BITS * (subgroup * SUBGROUP + within)
                value *= X_SCALE / (1 << (first_bit % 16))
                new_parts = ()
                for index in tl.static_range(HALVES * REPEATS):
                    bits = tiles[index].to(tl.uint32, bitcast=True)  # type: ignore[var-annotated]
                    if first_bit >= 16:
                        bits = bits >> 16
                    bits = bits & (((1 << BITS) - 1) << (first_bit % 16))
                    product = bits.to(tl.float32, bitcast=True) * value
                    new_parts = new_parts + (parts[index] + product,)  # type: ignore[assignment]
                parts = new_parts
            group = (slab * SLAB + 16 * SUBGROUP * subgroup) // GROUP
            if not HAS_ZEROS:
                inputs *= 1 << (BITS - 1)
            new_totals = ()
            for index in tl.static_range(HALVES * REPEATS):
                place = group.to(tl.int64) * total_outputs + outputs[index]
                scale = tl.load(scales + place, mask=slab < end, other=0.0).to(tl.float32)
                part = parts[index] * PART_SCALE
                if HAS_ZEROS:
                    part -= tl.load(zeros + place, mask=slab < end, other=0).to(tl.float32) * inputs
                else:
                    part -= inputs
                new_totals = new_totals + (totals[index] + part * scale,)  # type: ignore[assignment]
            totals = new_totals
        tiles = next_tiles
        values = next_values
    inverse = tl.full([], 1.0, tl.float32)
    if HAS_NORM:
        # All 8 lanes have the same inputs.
        inverse = tl.rsqrt(tl.sum(tl.sum(tl.sum(squares, axis=2), axis=1), axis=0) / (8 * K) + eps)
    n8 = tl.arange(0, 8)
    if MOST_SPLITS == 1:
        for repeat in tl.static_range(REPEATS):
            n = tile * (8 * REPEATS) + 8 * repeat + n8
            acc = tl.sum(tl.sum(totals[repeat], axis=2), axis=1) * inverse
            up = acc
            if GATED:
                up = tl.sum(tl.sum(totals[REPEATS + repeat], axis=2), axis=1) * inverse
            finish(y, bias, residual, 0, n, acc, up, n < N, N, 0, 0, GATED, HAS_BIAS, HAS_RESIDUAL)
    else:
        # Everyone leaves its summand; who comes last adds all of them, in the order of the splits.
        for index in tl.static_range(HALVES * REPEATS):
            n = tile * (8 * REPEATS) + 8 * (index % REPEATS) + n8
            acc = tl.sum(tl.sum(totals[index], axis=2), axis=1)
            tl.store(partial + (split * HALVES + index // REPEATS) * N + n, acc, mask=n < N)
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == num_splits - 1:
            for repeat in tl.static_range(REPEATS):
                n = tile * (8 * REPEATS) + 8 * repeat + n8
                acc = tl.zeros([8], tl.float32)
                up = acc
                for other in tl.static_range(MOST_SPLITS):
                    there = (n < N) & (other < num_splits)
                    from_split = partial + other * HALVES * N + n
                    acc += tl.load(from_split, mask=there, other=0.0, cache_modifier=".cg")
                    if GATED:
                        up += tl.load(from_split + N, mask=there, other=0.0, cache_modifier=".cg")
                finish(y, bias, residual, 0, n, acc, up, n < N, N, 0, 0, GATED, HAS_BIAS, HAS_RESIDUAL)
            tl.store(counters + tile, 0)


@triton.jit(do_not_specialize=["M", "num_splits", "prefetch_slabs"])
def _dot_kernel(
    x, words, scales, zeros, bias, residual, y, partial, counters,
    M, N, K, num_slabs, num_splits, split_slabs, x_stride, y_stride, residual_stride, prefetch_slabs,
    BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    MOST_SPLITS: tl.constexpr, WHOLE_K: tl.constexpr, GATED: tl.constexpr, HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DEPENDENT: tl.constexpr, ASSEMBLY: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """Program (rows, outputs, split). The weight is the left operand, so that few rows of x fill an instruction."""
    HALVES: tl.constexpr = 2 if GATED else 1
    PER_WORD: tl.constexpr = 32 // BITS
    SLAB: tl.constexpr = 16 * PER_WORD
    SUBGROUP: tl.constexpr = PER_WORD if GROUP >= SLAB else GROUP // 16
    m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, :]
    tile = tl.program_id(1)
    split = tl.program_id(2)
    begin = split * split_slabs
    end = tl.minimum(begin + split_slabs, num_slabs)
    own = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(own, N - 1)
    word = tl.arange(0, 16)
    total_outputs = N * HALVES
    step = total_outputs.to(tl.int64) * 16
    place = words + row[:, None] * 16 + word[None, :]
    x_rows = x + tl.minimum(m, M - 1).to(tl.int64) * x_stride
    if DEPENDENT:
        gdc_launch_dependents()
        prefetch(words, begin, end, step, tile * BLOCK_N, N, prefetch_slabs, THREADS, BLOCK_N)
        if GATED:
            prefetch(words + N * 16, begin, end, step, tile * BLOCK_N, N, prefetch_slabs, THREADS, BLOCK_N)
    scales_now = load_groups(scales, begin, end, row, total_outputs, BITS, GROUP, SUBGROUP)
    scales_up = scales_now
    zeros_now = scales_now
    zeros_up = scales_now
    if GATED:
        scales_up = load_groups(scales, begin, end, N + row, total_outputs, BITS, GROUP, SUBGROUP)
    if HAS_ZEROS:
        zeros_now = load_groups(zeros, begin, end, row, total_outputs, BITS, GROUP, SUBGROUP)
        zeros_up = zeros_now
        if GATED:
            zeros_up = load_groups(zeros, begin, end, N + row, total_outputs, BITS, GROUP, SUBGROUP)
    if DEPENDENT:
        gdc_wait()
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    up = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for slab in tl.range(begin, end, num_stages=STAGES):
        block = tl.load(place + slab * step)
        values = ()
        for j in tl.static_range(PER_WORD):
            k = (slab * SLAB + 16 * j + word)[:, None]
            if WHOLE_K:
                value = tl.load(x_rows + k)
            else:
                value = tl.load(x_rows + k, mask=k < K, other=0.0)
            values = values + (value,)  # type: ignore[assignment]
        # A slab ahead: these are too small for asynchronous copies.
        next_scales = load_groups(scales, slab + 1, end, row, total_outputs, BITS, GROUP, SUBGROUP)
        next_zeros = next_scales
        if HAS_ZEROS:
            next_zeros = load_groups(zeros, slab + 1, end, row, total_outputs, BITS, GROUP, SUBGROUP)
        acc = add_slab(acc, block, values, scales_now, zeros_now, BITS, SUBGROUP, HAS_ZEROS, ASSEMBLY)
        scales_now = next_scales
        zeros_now = next_zeros
        if GATED:
            block_up = tl.load(place + N * 16 + slab * step)
            next_up = load_groups(scales, slab + 1, end, N + row, total_outputs, BITS, GROUP, SUBGROUP)
            next_zeros_up = next_up
            if HAS_ZEROS:
                next_zeros_up = load_groups(zeros, slab + 1, end, N + row, total_outputs, BITS, GROUP, SUBGROUP)
            up = add_slab(up, block_up, values, scales_up, zeros_up, BITS, SUBGROUP, HAS_ZEROS, ASSEMBLY)
            scales_up = next_up
            zeros_up = next_zeros_up
    n = own[:, None]
    inside = (n < N) & (m < M)
    if MOST_SPLITS == 1:
        finish(
            y, bias, residual, m, n, acc, up, inside, N, y_stride, residual_stride, GATED, HAS_BIAS, HAS_RESIDUAL
        )  # fmt: skip
    else:
        # Everyone leaves its summand; who comes last adds all of them, in the order of the splits.
        at = m * N + n
        first = partial + split * (HALVES * M) * N + at
        tl.store(first, acc, mask=inside)
        if GATED:
            tl.store(first + M * N, up, mask=inside)
        tl.debug_barrier()
        counter = counters + tl.program_id(0) * tl.num_programs(1) + tile
        if tl.atomic_add(counter, 1, sem="acq_rel") == num_splits - 1:
            acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
            up = tl.zeros([BLOCK_N, ROWS], tl.float32)
            for index in tl.static_range(MOST_SPLITS):
                from_split = partial + index * (HALVES * M) * N + at
                there = inside & (index < num_splits)
                acc += tl.load(from_split, mask=there, other=0.0, cache_modifier=".cg")
                if GATED:
                    up += tl.load(from_split + M * N, mask=there, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
            finish(
                y, bias, residual, m, n, acc, up, inside, N, y_stride, residual_stride, GATED, HAS_BIAS, HAS_RESIDUAL
            )  # fmt: skip


def packed_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    config: PackedConfig,
    workspace: Workspace,
    *,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [M, K] in fp16 or bf16, rows may lie apart -> x W^T + bias (+ residual), [M, N].

    gated: silu(gate) * up, [M, N / 2], the gate's outputs of the weight first. norm, with "rows", or with "sum" and one
    split: (weight [K], eps), x is normalised on the way (RMSNorm). All else is fp32 until the one rounding at the end.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    num_rows, num_inputs = x.shape
    num_outputs = weight.num_outputs // 2 if gated else weight.num_outputs
    y = torch.empty(num_rows, num_outputs, dtype=output_dtype or x.dtype, device=x.device)
    if residual is not None and residual.stride(-1) != 1:
        residual = residual.contiguous()
    num_slabs = weight.words.shape[0]
    split_slabs = triton.cdiv(num_slabs, config.num_splits)
    num_splits = triton.cdiv(num_slabs, split_slabs)
    num_tiles = triton.cdiv(num_outputs, config.block_n)
    tensors = (
        x,
        weight.words,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        x if bias is None else bias,
        x if residual is None else residual,
    )
    dependent = has_dependent_launch(x.device)
    options = {
        "BITS": weight.bits, "GROUP": weight.group_size, "MOST_SPLITS": 1 if num_splits == 1 else MOST_SPLITS,
        "WHOLE_K": num_inputs % slab_inputs(weight.bits) == 0, "GATED": gated, "HAS_ZEROS": weight.zeros is not None,
        "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None, "DEPENDENT": dependent,
        "num_warps": config.num_warps, **launch_options(x.device),
    }  # fmt: skip
    spaces = (y, workspace.partial, workspace.counters)
    slabs = (num_slabs, num_splits, split_slabs)
    prefetch = 0
    if dependent:
        prefetch = _prefetch_slabs(num_tiles * num_splits, config, 2 if gated else 1, x.device)
    if config.kind == "sum":
        assert num_rows == 1 and (norm is None or num_splits == 1)
        assert num_splits == 1 or Workspace.holds(num_splits, 1, weight.num_outputs, num_tiles)
        norm_weight, eps = norm or (x, 0.0)
        _sum_kernel[num_tiles, num_splits](
            *tensors, norm_weight, *spaces, num_outputs, num_inputs, *slabs, eps, prefetch,
            REPEATS=config.block_n // 8, WARPS=config.num_warps, HAS_NORM=norm is not None, **options,
        )  # fmt: skip
        return y
    strides = (x.stride(0), y.stride(0), 0 if residual is None else residual.stride(0))
    if config.kind == "rows":
        assert num_rows <= MOST_ROWS and takes_rows(weight) and (norm is None or config.takes_norm)
        assert num_splits == 1 or Workspace.holds(num_splits, num_rows, weight.num_outputs, num_tiles)
        if dependent and config.prefetches:
            prefetch = max(prefetch, 2 * config.num_warps)
        given, sums = (x, x) if norm is None else norm_for_rows(x, weight, *norm)
        rows_kernel[num_tiles, num_splits](
            given, sums, *tensors[1:], *spaces, num_rows, num_outputs, num_inputs, *slabs, *strides, prefetch,
            REPEATS=config.block_n // 16, WARPS=config.num_warps, AHEAD=config.num_stages,
            PREFETCHES=config.prefetches, PREPARED=norm is not None, IS_BF16=x.dtype is torch.bfloat16,
            ASSEMBLY=x.device.type == "cuda", **options,
        )  # fmt: skip
        return y
    rows = dot_rows(num_rows)
    row_tiles = triton.cdiv(num_rows, rows)
    assert norm is None
    assert num_splits == 1 or Workspace.holds(num_splits, num_rows, weight.num_outputs, num_tiles * row_tiles)
    _dot_kernel[row_tiles, num_tiles, num_splits](
        *tensors, *spaces, num_rows, num_outputs, num_inputs, *slabs, *strides, prefetch,
        ROWS=rows, BLOCK_N=config.block_n, STAGES=config.num_stages, ASSEMBLY=x.device.type == "cuda",
        THREADS=32 * config.num_warps, **options,
    )  # fmt: skip
    return y


def takes_rows(weight: PackedWeight) -> bool:
    """Whether the "rows" kind can multiply by it: no slab has inputs of two groups."""
    return weight.group_size % slab_inputs(weight.bits) == 0


def _prefetch_slabs(num_programs: int, config: PackedConfig, halves: int, device: torch.device) -> int:
    """How many slabs of its outputs a program asks for before it waits for the kernel before it."""
    at_once = min(num_programs, 8 * _num_multiprocessors(device))
    return min(32 * config.num_warps, _PREFETCHED_BYTES // (at_once * halves * config.block_n * 4 * WORDS))


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def dot_rows(num_rows: int) -> int:
    """Rows of a program of the "dot" kind."""
    return min(MOST_DOT_ROWS, max(16, triton.next_power_of_2(num_rows)))
