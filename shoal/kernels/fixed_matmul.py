"""Matrix products whose bits depend on the row, the weight's row and K alone. Called by quantization/fixed_linear.py.

An output element is defined as: one chain of matrix instructions in fp32, 16 inputs after the other (fp32: one after
the other); the bias is added in fp32; the total is rounded once. Both kernels do just that whatever their tiles, so
they are chosen by speed; and cuBLAS does it too, where it does not split K.

What this rests on, measured on an H100 (2026-11): `mma.sync` m16n8k16 and `wgmma` m64nNk16, N 8 to 256, operands in
either order, give the same bits for bf16 and fp16, on data of one magnitude and of many. Zeros at the end of a chain
change nothing, so K may be padded.

M rows, N outputs, K inputs.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoal.kernels.launch import has_dependent_launch, launch_options

# Up to so many rows the kernel for few takes no more time than cuBLAS.
FEW_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product is cut: never visible in its bits.

    few: by the kernel for few rows. prefetch: lines of 128 bytes of each row of the weight that this one asks for
    before it waits for the kernel before it.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    few: bool = False
    prefetch: int = 0


@triton.jit
def _prefetch(pointers):
    """Ask for the 128 bytes at each pointer to be in the L2 cache soon."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["M"])
def _few_rows_kernel(
    x, weight, bias, output, M, N, x_stride, weight_stride,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PREFETCH: tl.constexpr,
    HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (columns, rows). The weight is the left operand, so that few rows of x fill an instruction."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_in, columns_in = rows < M, columns < N
    x_rows = x + rows[:, None] * x_stride
    weight_rows = weight + columns[:, None] * weight_stride
    if DEPENDENT:
        if PREFETCH > 0:  # the weight does not depend on the kernel before this one, whose end is near
            own = weight + tl.minimum(columns, N - 1)[:, None] * weight_stride
            _prefetch(own + 64 * tl.arange(0, PREFETCH)[None, :])
        gdc_wait()
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        if K % BLOCK_K == 0:
            left = tl.load(weight_rows + inner[None, :], mask=columns_in[:, None], other=0.0)
            right = tl.load(x_rows + inner[None, :], mask=rows_in[:, None], other=0.0)
        else:
            inside = inner[None, :] < K
            left = tl.load(weight_rows + inner[None, :], mask=columns_in[:, None] & inside, other=0.0)
            right = tl.load(x_rows + inner[None, :], mask=rows_in[:, None] & inside, other=0.0)
        total = tl.dot(left, right.T, total, input_precision="ieee")
    if DEPENDENT:  # earlier, the next kernel's programs would take the place of this one's
        gdc_launch_dependents()
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns_in, other=0.0).to(tl.float32)[:, None]
    outputs = output + rows[None, :].to(tl.int64) * N + columns[:, None]
    tl.store(outputs, total.to(output.dtype.element_ty), mask=rows_in[None, :] & columns_in[:, None])


@triton.jit(do_not_specialize=["M"])
def _many_rows_kernel(
    x, weight, bias, output, M, N, x_stride, weight_stride,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
    HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Tiles that run at the same time share rows and columns (BAND tiles of rows), so that the L2 cache serves them."""
    num_tiles_m, num_tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    band = tile // (BAND * num_tiles_n)
    height = min(num_tiles_m - band * BAND, BAND)
    within = tile % (BAND * num_tiles_n)
    rows = (band * BAND + within % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (within // height).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_in, columns_in = rows < M, columns < N
    x_rows = x + rows[:, None] * x_stride
    weight_rows = weight + columns[:, None] * weight_stride
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        if K % BLOCK_K == 0:
            left = tl.load(x_rows + inner[None, :], mask=rows_in[:, None], other=0.0)
            right = tl.load(weight_rows + inner[None, :], mask=columns_in[:, None], other=0.0)
        else:
            inside = inner[None, :] < K
            left = tl.load(x_rows + inner[None, :], mask=rows_in[:, None] & inside, other=0.0)
            right = tl.load(weight_rows + inner[None, :], mask=columns_in[:, None] & inside, other=0.0)
        total = tl.dot(left, right.T, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns_in, other=0.0).to(tl.float32)[None, :]
    outputs = output + rows[:, None] * N + columns[None, :]
    tl.store(outputs, total.to(output.dtype.element_ty), mask=rows_in[:, None] & columns_in[None, :])


def fixed_matmul(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, tiles: Tiles | None = None
) -> torch.Tensor:
    """x [M, K] times weight [N, K] transposed, plus bias [N] -> [M, N]. tiles: None chooses by the number of rows."""
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0]
    output = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    if output.numel() == 0:
        return output
    if x.stride(1) != 1:
        x = x.contiguous()
    tiles = tiles or choose_tiles(num_rows, x.dtype)
    grid_m, grid_n = triton.cdiv(num_rows, tiles.block_m), triton.cdiv(num_outputs, tiles.block_n)
    common = {
        "K": num_inputs, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k,
        "HAS_BIAS": bias is not None, "DEPENDENT": has_dependent_launch(x.device),
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages, **launch_options(x.device),
    }  # fmt: skip
    tensors = (x, weight, bias, output, num_rows, num_outputs, x.stride(0), weight.stride(0))
    if tiles.few:
        prefetch = tiles.prefetch if num_inputs >= 64 * tiles.prefetch else 0
        _few_rows_kernel[(grid_n, grid_m)](*tensors, PREFETCH=prefetch, **common)
    else:
        _many_rows_kernel[(grid_m * grid_n,)](*tensors, BAND=8, **common)
    return output


def choose_tiles(num_rows: int, dtype: torch.dtype) -> Tiles:
    """By speed alone, and few distinct ones: each is compiled for each K.

    H100 (3.0 TB/s of copy bandwidth, 2026-11), bf16, the Llama-8B shape, µs, cuBLAS in brackets. One row: o 14.0
    (15.8), gate-up 79.7 (85.5), down 41.9 (43.6). 32 rows: qkv 19.8 (21.7), o 14.2 (14.4), gate-up 84.9 (88.9), down
    46.4 (45.8). A whole layer with norms and attention: one row 168 (183), 16 rows with 700 tokens each 195 (202).
    """
    if dtype is torch.float32:  # plain fused multiply-adds
        return Tiles(16, 32, 32, 4, 2, few=True) if num_rows <= FEW_ROWS else Tiles(64, 64, 32, 8, 2)
    if num_rows <= 16:
        return Tiles(8 if num_rows <= 8 else 16, 16, 256, 1, 5, few=True, prefetch=8)
    if num_rows <= FEW_ROWS:
        return Tiles(32, 64, 128, 4, 5, few=True)
    return Tiles(64, 64, 64, 4, 4) if num_rows <= 64 else Tiles(128, 128, 64, 8, 4)
