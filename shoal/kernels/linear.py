"""Linear layers for 1 to 16 rows at the speed of reading their weight, with what stands before and after them fused in.

M rows, K inputs, N outputs (gated: N of the gate and as many of up, the weight has 2 N rows). Called through
kernels/tuning.py, which chooses among these and cuBLAS. A program owns BLOCK_N outputs: `_sum_kernel` multiplies and
sums up to 8 rows of x in registers, `_dot_kernel` gives up to 16 to the matrix units, the weight as the left operand.

A weight may have a byte an element, FP8 or INT8, and scales (`ByteScales`): it is converted in registers.

On sm_90 a program's first blocks of the weight are on their way before the kernel before it has ended. A layer of an 8B
model (norm, qkv, o, norm, gate-up, down) in CUDA graphs on an H100 (copies: 2.99 TB/s), 2026-11: 151 µs for 1 row, 97 %
of what a copy takes for the weights, and 162-165 µs for 4 to 16; with cuBLAS 170-174 µs. Of a 0.6B model: 16.3 µs (norm
and residual fused in) and 23-24 µs; with cuBLAS 31-32 µs.
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

MAX_ROWS = 16
MOST_SPLITS = 8
# Bytes that a thread loads at once.
_VECTOR_BYTES = 16
# What the bits of an FP8 number (e4m3) mean as the upper bits of an fp16: its value by this.
FP8_AS_FP16 = 2.0**-8


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """How a product is cut. `kind`: "sum" (one row) or "dot"."""

    kind: str
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 1
    num_splits: int = 1
    # What a program asks into L2 before it waits for the kernel before it, sm_90 only.
    prefetch_bytes: int = 32768

    @property
    def label(self) -> str:
        """What stands for it in files."""
        cut = f"{self.kind} {self.block_n}x{self.block_k} warps={self.num_warps} stages={self.num_stages}"
        return f"{cut} splits={self.num_splits} prefetch={self.prefetch_bytes}"


@dataclasses.dataclass(frozen=True)
class ByteScales:
    """What the elements of a weight of one byte are multiplied by, fp32: [N], one an output; or with `block` (outputs,
    inputs) [N / outputs, K / inputs], rounded up, of which the inputs are a multiple of 16."""

    values: torch.Tensor
    block: tuple[int, int] | None = None


@functools.cache
def converts_fp8(device: torch.device) -> bool:
    """Whether the GPU converts FP8 numbers: sm_89 and later. Others, and the interpreter, take their bits apart."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def as_numbers(block, FP8_BITS: tl.constexpr):
    """A block of a weight as it was loaded, as numbers: fp16 by FP8_AS_FP16 where FP8 comes as uint8, else as it is."""
    numbers = block
    if FP8_BITS:
        bits = block.to(tl.int16)
        numbers = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return numbers


@triton.jit
def as_operand(block, like, FP8_BITS: tl.constexpr, ASSEMBLES: tl.constexpr):
    """The same, of the type of `like`, for the matrix units.

    From FP8 to bf16 by its bits: moved to their places they are a bf16 of its value by 2^-120. The GPU's own conversion
    goes by way of fp16 and fp32, and took 20 % longer for a whole product (H200, 2026-11).
    """
    FP8: tl.constexpr = FP8_BITS or block.dtype.is_fp8e4nv()
    if ASSEMBLES and FP8 and like.dtype == tl.bfloat16:
        # By 2^112 the result is by FP8_AS_FP16, as the scales of uint8 expect it.
        FACTOR: tl.constexpr = "0x77807780" if FP8_BITS else "0x7b807b80"
        numbers = tl.inline_asm_elementwise(
            """
            {
                .reg .b32 low, high, sign, rest;
                prmt.b32 low, $2, 0, 0x1404;
                prmt.b32 high, $2, 0, 0x3424;
                and.b32 sign, low, 0x80008000;
                shr.b32 rest, low, 4;
                and.b32 rest, rest, 0x07f007f0;
                or.b32 low, sign, rest;
                and.b32 sign, high, 0x80008000;
                shr.b32 rest, high, 4;
                and.b32 rest, rest, 0x07f007f0;
                or.b32 high, sign, rest;
                mov.b32 sign, 0x80008000;
                mov.b32 rest, """
            + FACTOR
            + """;
                fma.rn.bf16x2 $0, low, rest, sign;
                fma.rn.bf16x2 $1, high, rest, sign;
            }
            """,
            "=r,=r,r",
            [block.to(tl.uint8, bitcast=True)],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        numbers = as_numbers(block, FP8_BITS).to(like.dtype)
    return numbers


@triton.jit
def _prefetch(
    weight, n, k, row_stride, num_bytes, N, K, THREADS: tl.constexpr, BLOCK_N: tl.constexpr, ITEMSIZE: tl.constexpr
):
    """Ask the first num_bytes of each of BLOCK_N rows of the weight into L2, each thread for a piece of one row."""
    if num_bytes > 0:
        PIECES: tl.constexpr = THREADS // BLOCK_N
        thread = tl.arange(0, THREADS)
        row = n + thread // PIECES
        piece = num_bytes // PIECES
        column = k + thread % PIECES * (piece // ITEMSIZE)
        inside = (row < N) & (column + piece // ITEMSIZE <= K)
        address = weight + tl.where(inside, row, 0).to(tl.int64) * row_stride + tl.where(inside, column, 0)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [address, tl.where(inside, piece, 16)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _finish(
    y, bias, scales, residual, m, n, acc, up, M, N, y_stride, residual_stride,
    GATED: tl.constexpr, SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Scales, then what `finish` does. acc and up [BLOCK_N, rows], n [BLOCK_N, 1], m [1, rows]."""
    inside = (n < N) & (m < M)
    if SCALES == 1:
        acc *= tl.load(scales + n, mask=n < N, other=0.0)
        if GATED:
            up *= tl.load(scales + N + n, mask=n < N, other=0.0)
    finish(y, bias, residual, m, n, acc, up, inside, N, y_stride, residual_stride, GATED, HAS_BIAS, HAS_RESIDUAL)


@triton.jit(do_not_specialize=["M", "prefetch_bytes"])
def _sum_kernel(
    x, weight, bias, scales, residual, norm, y, M, N, K, x_stride, w_stride, y_stride, residual_stride, eps,
    prefetch_bytes,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr, DEPENDENT: tl.constexpr,
    THREADS: tl.constexpr, VECTOR: tl.constexpr, FP8_BITS: tl.constexpr, SCALES: tl.constexpr, SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    pointer = weight + tl.minimum(n, N - 1).to(tl.int64) * w_stride + k
    other_half = N.to(tl.int64) * w_stride
    ITEMSIZE: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    if DEPENDENT:
        gdc_launch_dependents()
        _prefetch(weight, first, 0, w_stride, prefetch_bytes, N, K, THREADS, BLOCK_N, ITEMSIZE)
        if GATED:
            _prefetch(weight + other_half, first, 0, w_stride, prefetch_bytes, N, K, THREADS, BLOCK_N, ITEMSIZE)
    tile = _load(pointer, k, K, WHOLE_K)
    tile_up = tile
    if GATED:
        tile_up = _load(pointer + other_half, k, K, WHOLE_K)
    if DEPENDENT:
        gdc_wait()
    nothing = tl.zeros([BLOCK_N, BLOCK_K // VECTOR], tl.float32)
    totals = (nothing,) * ROWS
    totals_up = (nothing,) * ROWS if GATED else ()
    squares = (tl.zeros([1, BLOCK_K // VECTOR], tl.float32),) * ROWS if HAS_NORM else ()
    for start in range(0, K, BLOCK_K):
        # The next block is on its way while this one is multiplied.
        later = k + start + BLOCK_K
        inside = later < K
        next_tile = tl.load(pointer + start + BLOCK_K, mask=inside, other=0.0)
        next_up = next_tile
        if GATED:
            next_up = tl.load(pointer + other_half + start + BLOCK_K, mask=inside, other=0.0)
        scale = k
        if HAS_NORM:
            scale = _load(norm + start + k, start + k, K, WHOLE_K).to(tl.float32)
        block_scale = tl.zeros([BLOCK_N, BLOCK_K // VECTOR], tl.float32)
        block_scale_up = block_scale
        if SCALES == 2:
            column = start + VECTOR * tl.arange(0, BLOCK_K // VECTOR)[None, :]
            block_scale = _load_scales(scales, n, column, N, K, SCALE_N, SCALE_K)
            if GATED:
                block_scale_up = _load_scales(scales, N + n, column, 2 * N, K, SCALE_N, SCALE_K)
        new_totals = ()
        new_up = ()
        new_squares = ()
        for m in tl.static_range(ROWS):
            if ROWS == 1:
                value = _load(x + start + k, start + k, K, WHOLE_K).to(tl.float32)
            else:
                inside = (start + k < K) & (m < M)
                value = tl.load(x + m * x_stride + start + k, mask=inside, other=0.0).to(tl.float32)
            if HAS_NORM:
                new_squares = new_squares + (squares[m] + sum_vectors(value * value, VECTOR),)  # type: ignore[assignment]
                value *= scale
            part = sum_vectors(as_numbers(tile, FP8_BITS).to(tl.float32) * value, VECTOR)
            if SCALES == 2:
                part *= block_scale
            new_totals = new_totals + (totals[m] + part,)  # type: ignore[assignment]
            if GATED:
                part = sum_vectors(as_numbers(tile_up, FP8_BITS).to(tl.float32) * value, VECTOR)
                if SCALES == 2:
                    part *= block_scale_up
                new_up = new_up + (totals_up[m] + part,)  # type: ignore[assignment]
        totals = new_totals
        totals_up = new_up
        squares = new_squares
        tile = next_tile
        tile_up = next_up
    total = _sum_threads(totals, ROWS)
    up = total
    if GATED:
        up = _sum_threads(totals_up, ROWS)
    if HAS_NORM:
        inverse = tl.rsqrt(_sum_threads(squares, ROWS) / K + eps)
        total *= inverse
        up *= inverse
    m = tl.arange(0, ROWS)[None, :]
    _finish(
        y, bias, scales, residual, m, n, total, up, M, N, y_stride, residual_stride, GATED, SCALES, HAS_BIAS,
        HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit
def _load_scales(scales, n, k, N, K, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr):
    """Of blocks: what the outputs n and inputs k are multiplied by."""
    return tl.load(scales + n // SCALE_N * tl.cdiv(K, SCALE_K) + k // SCALE_K, mask=(n < N) & (k < K), other=0.0)


@triton.jit
def sum_vectors(products, VECTOR: tl.constexpr):
    """[A, B] -> [A, B / VECTOR]: each thread adds what it holds of a vector."""
    A: tl.constexpr = products.shape[0]
    B: tl.constexpr = products.shape[1]
    return tl.sum(tl.reshape(products, [A, B // VECTOR, VECTOR]), axis=2)


@triton.jit
def _sum_threads(values, ROWS: tl.constexpr):
    """What the threads have, a [A, B] for each row -> [A, ROWS], in one exchange for all rows."""
    A: tl.constexpr = values[0].shape[0]
    B: tl.constexpr = values[0].shape[1]
    if ROWS == 1:
        stacked = tl.reshape(values[0], [A, B, 1])
    elif ROWS == 2:
        stacked = tl.join(values[0], values[1])
    elif ROWS == 4:
        stacked = tl.join(tl.join(values[0], values[2]), tl.join(values[1], values[3]))
    else:
        even = tl.join(tl.join(values[0], values[4]), tl.join(values[2], values[6]))
        stacked = tl.join(even, tl.join(tl.join(values[1], values[5]), tl.join(values[3], values[7])))
    return tl.sum(tl.reshape(stacked, [A, B, ROWS]), axis=1)


@triton.jit
def _load(pointer, k, K, WHOLE_K: tl.constexpr):
    """A block whose columns are k; beyond K zeros."""
    if WHOLE_K:
        return tl.load(pointer)
    return tl.load(pointer, mask=k < K, other=0.0)


@triton.jit(do_not_specialize=["M", "prefetch_bytes", "num_splits"])
def _dot_kernel(
    x, weight, bias, scales, residual, y, partial, counters,
    M, N, K, num_splits, split_size, x_stride, w_stride, y_stride, residual_stride, prefetch_bytes,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MOST_SPLITS: tl.constexpr, STAGES: tl.constexpr,
    WHOLE_K: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    DEPENDENT: tl.constexpr, THREADS: tl.constexpr, FP8_BITS: tl.constexpr, SCALES: tl.constexpr,
    SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, ASSEMBLES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    split = tl.program_id(1)
    first = tile * BLOCK_N
    begin = split * split_size
    end = tl.minimum(begin + split_size, K)
    n = first + tl.arange(0, BLOCK_N)[:, None]
    m = tl.arange(0, ROWS)[None, :]
    k = tl.arange(0, BLOCK_K)
    pointer = weight + tl.minimum(n, N - 1).to(tl.int64) * w_stride + k[None, :]
    other_half = N.to(tl.int64) * w_stride
    ITEMSIZE: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    if DEPENDENT:
        gdc_launch_dependents()
        _prefetch(weight, first, begin, w_stride, prefetch_bytes, N, K, THREADS, BLOCK_N, ITEMSIZE)
        if GATED:
            _prefetch(weight + other_half, first, begin, w_stride, prefetch_bytes, N, K, THREADS, BLOCK_N, ITEMSIZE)
        gdc_wait()
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    up = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        column = start + k
        mask = m < M
        if not WHOLE_K:
            mask = mask & (column[:, None] < end)
        value = tl.load(x + m * x_stride + column[:, None], mask=mask, other=0.0)
        block = as_operand(_load(pointer + start, column[None, :], end, WHOLE_K), value, FP8_BITS, ASSEMBLES)
        if SCALES == 2:  # BLOCK_K divides SCALE_K
            part = tl.dot(block, value, input_precision="ieee")
            acc += part * _load_scales(scales, n, start, N * (2 if GATED else 1), K, SCALE_N, SCALE_K)
        else:
            acc = tl.dot(block, value, acc, input_precision="ieee")
        if GATED:
            block_up = _load(pointer + other_half + start, column[None, :], end, WHOLE_K)
            block_up = as_operand(block_up, value, FP8_BITS, ASSEMBLES)
            if SCALES == 2:
                part = tl.dot(block_up, value, input_precision="ieee")
                up += part * _load_scales(scales, N + n, start, 2 * N, K, SCALE_N, SCALE_K)
            else:
                up = tl.dot(block_up, value, up, input_precision="ieee")
    if MOST_SPLITS == 1:
        _finish(
            y, bias, scales, residual, m, n, acc, up, M, N, y_stride, residual_stride, GATED, SCALES, HAS_BIAS,
            HAS_RESIDUAL,
        )  # fmt: skip
    else:
        # Everyone leaves its summand; who comes last adds all of them, in the order of the splits.
        HALVES: tl.constexpr = 2 if GATED else 1
        inside = (n < N) & (m < M)
        place = m * N + n
        own = partial + split * (HALVES * ROWS) * N + place
        tl.store(own, acc, mask=inside)
        if GATED:
            tl.store(own + ROWS * N, up, mask=inside)
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == num_splits - 1:
            acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
            up = tl.zeros([BLOCK_N, ROWS], tl.float32)
            for index in tl.static_range(MOST_SPLITS):
                from_split = partial + index * (HALVES * ROWS) * N + place
                there = inside & (index < num_splits)
                acc += tl.load(from_split, mask=there, other=0.0, cache_modifier=".cg")
                if GATED:
                    up += tl.load(from_split + ROWS * N, mask=there, other=0.0, cache_modifier=".cg")
            tl.store(counters + tile, 0)
            _finish(
                y, bias, scales, residual, m, n, acc, up, M, N, y_stride, residual_stride, GATED, SCALES, HAS_BIAS,
                HAS_RESIDUAL,
            )  # fmt: skip


class Workspace:
    """Where split products leave their summands (16 MB). One serves all products that run in turn on a stream."""

    MOST_VALUES = 4 << 20
    MOST_TILES = 8192

    def __init__(self, device: torch.device) -> None:
        self.partial = torch.empty(self.MOST_VALUES, dtype=torch.float32, device=device)
        self.counters = torch.zeros(self.MOST_TILES, dtype=torch.int32, device=device)

    @classmethod
    def holds(cls, num_splits: int, num_rows: int, num_outputs: int, num_tiles: int) -> bool:
        """Whether a product so cut fits (num_outputs: rows of the weight)."""
        return num_splits * num_rows * num_outputs <= cls.MOST_VALUES and num_tiles <= cls.MOST_TILES


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: LinearConfig,
    workspace: Workspace,
    *,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    output_dtype: torch.dtype | None = None,
    scales: ByteScales | None = None,
) -> torch.Tensor:
    """x [M, K], M 1..16, rows may lie apart; weight [N, K], gated [2 N, K] -> x W^T + bias (+ residual), [M, N].

    gated: silu(gate) * up, the gate's rows of the weight first. norm, with "sum" alone: (weight [K], eps), x is
    normalised on the way (RMSNorm). scales: of a weight of int8 or uint8, or of float8_e4m3fn where `converts_fp8`;
    uint8 are the bits of FP8, whose scales are by 1 / FP8_AS_FP16 larger.
    Everything is fp32 until the one rounding at the end.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    y = torch.empty(num_rows, num_outputs, dtype=output_dtype or x.dtype, device=x.device)
    if residual is not None and residual.stride(-1) != 1:
        residual = residual.contiguous()
    norm_weight, eps = norm or (x, 0.0)
    tensors = (
        x,
        weight,
        x if bias is None else bias,
        x if scales is None else scales.values,
        x if residual is None else residual,
    )
    scale_block = (scales.block if scales is not None else None) or (1, 1)
    strides = (x.stride(0), weight.stride(0), y.stride(0), 0 if residual is None else residual.stride(0))
    # What a program has of a row.
    part = triton.cdiv(triton.cdiv(num_inputs, config.num_splits), config.block_k) * config.block_k
    dependent = has_dependent_launch(x.device)
    prefetch = _prefetch_bytes(config, weight, part) if dependent else 0
    options = {
        "GATED": gated, "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None,
        "DEPENDENT": dependent, "WHOLE_K": num_inputs % config.block_k == 0,
        "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "THREADS": 32 * config.num_warps, "num_warps": config.num_warps, **launch_options(x.device),
        "FP8_BITS": weight.dtype is torch.uint8, "SCALES": 0 if scales is None else 1 if scales.block is None else 2,
        "SCALE_N": scale_block[0], "SCALE_K": scale_block[1],
    }  # fmt: skip
    num_tiles = triton.cdiv(num_outputs, config.block_n)
    grid: tuple[int, ...]
    arguments: tuple
    if config.kind == "sum":
        kernel, grid = _sum_kernel, (num_tiles,)
        arguments = (*tensors, norm_weight, y, num_rows, num_outputs, num_inputs, *strides, eps, prefetch)
        options |= {
            "ROWS": triton.next_power_of_2(num_rows), "HAS_NORM": norm is not None,
            "VECTOR": _VECTOR_BYTES // weight.itemsize,
        }  # fmt: skip
    else:
        num_splits = triton.cdiv(num_inputs, part)
        rows = 8 if num_rows <= 8 else 16
        assert scales is None or scales.block is None or scales.block[1] % config.block_k == 0
        assert norm is None and (num_splits == 1 or Workspace.holds(num_splits, rows, weight.shape[0], num_tiles))
        kernel, grid = _dot_kernel, (num_tiles, num_splits)
        sizes = (num_rows, num_outputs, num_inputs, num_splits, part)
        arguments = (*tensors, y, workspace.partial, workspace.counters, *sizes, *strides, prefetch)
        options |= {"ROWS": rows, "MOST_SPLITS": 1 if num_splits == 1 else MOST_SPLITS, "STAGES": config.num_stages}
        options["ASSEMBLES"] = x.device.type == "cuda"  # the interpreter knows no assembly
    kernel[grid](*arguments, **options)
    return y


def _prefetch_bytes(config: LinearConfig, weight: torch.Tensor, part: int) -> int:
    """Bytes of each row of a program's weight to ask for early: equal pieces of 16 bytes for the threads of a row."""
    pieces = 32 * config.num_warps // config.block_n
    if pieces == 0 or weight.data_ptr() % 16 or weight.stride(0) * weight.itemsize % 16 or weight.itemsize > 2:
        return 0
    row_bytes = min(part * weight.itemsize, config.prefetch_bytes // config.block_n)
    return row_bytes // (16 * pieces) * (16 * pieces)
