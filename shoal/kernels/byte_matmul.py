"""Products of many rows with weights of one byte (FP8, INT8): quantizing the rows, multiplying, dequantizing a weight.

Called by quantization/byte_cuda.py. A product of few rows is kernels/linear.py's, which leaves the rows as they are.
M rows, N outputs, K inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shoal.kernels.linear import ByteScales, as_numbers

# The largest numbers.
_MOST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# Adding and taking away 1.5 * 2^23 rounds a small fp32 to the nearest integer, ties to even.
_ROUNDS = tl.constexpr(12582912.0)


@triton.jit
def _to_bytes(values, scales, q, MOST: tl.constexpr):
    values = tl.clamp(tl.div_rn(values, tl.broadcast_to(scales, values.shape)), -MOST, MOST)
    if q.dtype.element_ty == tl.int8:
        values = (values + _ROUNDS) - _ROUNDS
    return values.to(q.dtype.element_ty)


@triton.jit
def _quantize_rows_kernel(
    x, q, scales, K, x_stride, MOST: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    """A program a row. GROUP 0: one scale, STATIC: which is given."""
    row = tl.program_id(0).to(tl.int64)
    if GROUP > 0:
        num_groups = tl.cdiv(K, GROUP)
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        for first in range(0, num_groups, GROUPS):
            group = first + tl.arange(0, GROUPS)
            k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            values = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
            scale = tl.maximum(tl.max(tl.abs(values), axis=1), 1e-10) / MOST
            tl.store(scales + row * num_groups + group, scale, mask=group < num_groups)
            tl.store(q + row * K + k, _to_bytes(values, scale[:, None], q, MOST), mask=k < K)
    else:
        if STATIC:
            scale = tl.load(scales)
        else:
            most = tl.zeros([BLOCK_K], tl.float32)
            for start in range(0, K, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                most = tl.maximum(most, tl.abs(tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)))
            scale = tl.maximum(tl.max(most, axis=0), 1e-10) / MOST
            tl.store(scales + row, scale)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            values = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
            tl.store(q + row * K + k, _to_bytes(values, scale, q, MOST), mask=k < K)


def quantize_rows(
    x: torch.Tensor, dtype: torch.dtype, *, group: int = 0, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> (numbers of `dtype` [M, K], scales fp32): [M, 1]; by groups [M, K / group]; or the given one, [1]."""
    num_rows, size = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    q = torch.empty(num_rows, size, dtype=dtype, device=x.device)
    if scale is None:
        scale_shape = (num_rows, triton.cdiv(size, group) if group else 1)
        scales = torch.empty(scale_shape, dtype=torch.float32, device=x.device)
    else:
        scales = scale
    if num_rows:
        block = max(group, min(4096, triton.next_power_of_2(size)))
        _quantize_rows_kernel[(num_rows,)](
            x, q, scales, size, x.stride(0), MOST=_MOST[dtype], BLOCK_K=block, GROUP=group, STATIC=scale is not None,
            num_warps=8 if block >= 2048 else 4,
        )  # fmt: skip
    return q, scales


@triton.jit(do_not_specialize=["M"])
def _byte_matmul_kernel(
    x, x_scales, weight, scales, bias, y, M, N, K, w_stride, x_scale_rows,
    X_GROUPS: tl.constexpr, SCALES: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    SHARES_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr, WHOLE_K: tl.constexpr,
):  # fmt: skip
    """Tiles that run at the same time share rows and columns (BAND tiles of rows), so that the L2 cache serves them."""
    num_tiles_m, num_tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    band = tile // (BAND * num_tiles_n)
    height = min(num_tiles_m - band * BAND, BAND)
    within = tile % (BAND * num_tiles_n)
    m = (band * BAND + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the end compute again what the last one does, and are not stored.
    row, column = tl.minimum(m, M - 1).to(tl.int64), tl.minimum(n, N - 1).to(tl.int64)
    x_tile = x + row[:, None] * K + k[None, :]
    w_tile = weight + column[None, :] * w_stride + k[:, None]
    WHOLE_NUMBERS: tl.constexpr = x.dtype.element_ty == tl.int8
    if SCALES == 1 and WHOLE_NUMBERS:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if WHOLE_K:
            left, right = tl.load(x_tile + start), tl.load(w_tile + start)
        else:
            left = tl.load(x_tile + start, mask=start + k[None, :] < K, other=0.0)
            right = tl.load(w_tile + start, mask=start + k[:, None] < K, other=0.0)
        if SCALES == 1:
            if WHOLE_NUMBERS:
                total = tl.dot(left, right, total, out_dtype=tl.int32)
            else:
                total = tl.dot(left, right, total)
        else:  # BLOCK_K divides SCALE_K
            if WHOLE_NUMBERS:
                part = tl.dot(left, right, out_dtype=tl.int32).to(tl.float32)
            else:
                part = tl.dot(left, right)
            block_row = scales + start // SCALE_K
            if SHARES_SCALE:  # all outputs of the tile
                factor = tl.load(block_row + (within // height) * BLOCK_N // SCALE_N * tl.cdiv(K, SCALE_K))
                if X_GROUPS:
                    factor *= tl.load(x_scales + row * tl.cdiv(K, SCALE_K) + start // SCALE_K)[:, None]
                total += part * factor
            else:
                part *= tl.load(block_row + column // SCALE_N * tl.cdiv(K, SCALE_K))[None, :]
                if X_GROUPS:
                    part *= tl.load(x_scales + row * tl.cdiv(K, SCALE_K) + start // SCALE_K)[:, None]
                total += part
    result = total.to(tl.float32)
    if SCALES == 1:
        result *= tl.load(scales + column)[None, :]
    if not X_GROUPS:
        result *= tl.load(x_scales + row * x_scale_rows)[:, None]
    if HAS_BIAS:
        result += tl.load(bias + column).to(tl.float32)[None, :]
    outputs = y + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(outputs, result.to(y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def byte_matmul(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: ByteScales,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    tiles: tuple[int, int, int, int, int] | None = None,
) -> torch.Tensor:
    """x [M, K] and weight [N, K], both int8 or both float8_e4m3fn -> [M, N] of `dtype`.

    x_scales: as `quantize_rows` gives them; by groups only those of the weight's blocks. Sums are fp32, of INT8 exact.
    tiles: as `choose_tiles`.
    """
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0]
    y = torch.empty(num_rows, num_outputs, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    block_m, block_n, block_k, warps, stages = tiles or choose_tiles(num_rows, scales.block is not None)
    block = scales.block or (1, 1)
    if scales.block is not None:
        block_k = min(block_k, block[1] & -block[1])
    _byte_matmul_kernel[(triton.cdiv(num_rows, block_m) * triton.cdiv(num_outputs, block_n),)](
        x, x_scales, weight, scales.values, x if bias is None else bias, y, num_rows, num_outputs, num_inputs,
        weight.stride(0), 1 if x_scales.shape[0] == num_rows else 0,
        X_GROUPS=x_scales.dim() == 2 and x_scales.shape[1] > 1, SCALES=1 if scales.block is None else 2,
        SCALE_N=block[0], SCALE_K=block[1], HAS_BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n,
        SHARES_SCALE=block[0] % block_n == 0,
        BLOCK_K=block_k, BAND=8, WHOLE_K=num_inputs % block_k == 0, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def choose_tiles(num_rows: int, by_blocks: bool) -> tuple[int, int, int, int, int]:
    """Rows, outputs, inputs, warps, stages.

    H200, 28672 x 4096, without quantizing the rows, µs for 64, 512, 2048 rows, 2026-11: FP8 by blocks 35, 141, 590;
    INT8 35, 115, 369; cuBLAS in bf16 64, 158, 615. By blocks tiles of 128 rows took 636: their two sums fill registers.
    """
    if num_rows <= 32:
        return 32, 64, 128, 4, 4
    return (64, 128, 128, 4, 4) if by_blocks or num_rows <= 512 else (128, 128, 128, 8, 3)


@triton.jit
def _dequantize_kernel(
    weight, scales, out, N, K, w_stride, FP8_BITS: tl.constexpr, SCALES: tl.constexpr, SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = (n < N) & (k < K)
    values = as_numbers(tl.load(weight + n * w_stride + k, mask=inside, other=0.0), FP8_BITS).to(tl.float32)
    if SCALES == 1:
        values *= tl.load(scales + n, mask=n < N, other=0.0)
    else:
        values *= tl.load(scales + n // SCALE_N * tl.cdiv(K, SCALE_K) + k // SCALE_K, mask=inside, other=0.0)
    tl.store(out + n * K + k, values.to(out.dtype.element_ty), mask=inside)


def dequantize(weight: torch.Tensor, scales: ByteScales, dtype: torch.dtype) -> torch.Tensor:
    """weight [N, K] as kernels/linear.py takes it -> [N, K] of `dtype`."""
    num_outputs, num_inputs = weight.shape
    out = torch.empty(num_outputs, num_inputs, dtype=dtype, device=weight.device)
    block = scales.block or (1, 1)
    _dequantize_kernel[(triton.cdiv(num_outputs, 4), triton.cdiv(num_inputs, 1024))](
        weight, scales.values, out, num_outputs, num_inputs, weight.stride(0), FP8_BITS=weight.dtype is torch.uint8,
        SCALES=1 if scales.block is None else 2, SCALE_N=block[0], SCALE_K=block[1], BLOCK_N=4, BLOCK_K=1024,
        num_warps=8,
    )  # fmt: skip
    return out
