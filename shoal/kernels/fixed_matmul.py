"""Matrix products whose bits depend on the row, the weight's row and K alone. Called by quantization/fixed_linear.py.

An output element is defined as: the inputs are cut into `num_shards` equal pieces; each piece is summed in fp32 by one
chain of matrix instructions over 16 inputs after the other (fp32: one after the other); the pieces' sums are added in a
tree of neighbours, ((0+1)+(2+3))+((4+5)+(6+7)); the bias is added in fp32; the total is rounded once. Every kernel here
does just that, whatever its tiles, so they may be chosen by speed.

What this rests on, measured on an H100 (2026-11): `mma.sync` m16n8k16 and `wgmma` m64nNk16, N 8 to 256, operands in
either order, give the same bits for bf16 and fp16, on data of one magnitude and of many. Zeros at the end of a chain
change nothing, so pieces may be padded.

M rows, N outputs, K inputs, S shards of the inputs, G groups of shards (each computed by programs of its own).
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoal.kernels.launch import has_dependent_launch, launch_options

# Up to this many rows all shards of a tile are summed side by side.
FEW_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product is cut: never visible in its bits.

    groups: programs that share the shards of one tile. prefetch: lines of 128 bytes of each row of the weight that are
    asked for before the kernel waits for the one before.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    groups: int = 1
    side_by_side: bool = False
    prefetch: int = 0
    launch: int = 0


@triton.jit
def _add_step(x, weight, rows_in, columns_in, inner, end, total, EVEN: tl.constexpr):
    """total [BLOCK_N, BLOCK_M] plus one step along the inputs; x, weight: pointers to the step's rows."""
    if EVEN:
        left = tl.load(weight + inner[None, :], mask=columns_in[:, None], other=0.0)
        right = tl.load(x + inner[None, :], mask=rows_in[:, None], other=0.0)
    else:
        inside = inner[None, :] < end
        left = tl.load(weight + inner[None, :], mask=columns_in[:, None] & inside, other=0.0)
        right = tl.load(x + inner[None, :], mask=rows_in[:, None] & inside, other=0.0)
    return tl.dot(left, right.T, total, input_precision="ieee")


@triton.jit
def _prefetch(pointers):
    """Ask for the 128 bytes at each pointer to be in the L2 cache soon."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["M"])
def _few_rows_kernel(
    x, weight, bias, output, M, N, x_stride, weight_stride,
    SHARD_SIZE: tl.constexpr, SHARDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    LAUNCH: tl.constexpr, PREFETCH: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """All shards of a tile side by side in one loop: so many independent chains and loads hide each other's latency."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_in, columns_in = rows < M, columns < N
    x_rows = x + rows[:, None] * x_stride
    weight_rows = weight + columns[:, None] * weight_stride
    if DEPENDENT:
        if LAUNCH == 0:
            gdc_launch_dependents()
        # The weight does not depend on the kernel before this one, whose end is near.
        if PREFETCH > 0:
            for shard in tl.static_range(SHARDS):
                lines = shard * SHARD_SIZE + 64 * tl.arange(0, PREFETCH // SHARDS)[None, :]
                _prefetch(weight + tl.minimum(columns, N - 1)[:, None] * weight_stride + lines)
        gdc_wait()
        if LAUNCH == 1:
            gdc_launch_dependents()
    zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    t0, t1, t2, t3, t4, t5, t6, t7 = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    for start in range(0, SHARD_SIZE, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        t0 = _add_step(x_rows, weight_rows, rows_in, columns_in, inner, SHARD_SIZE, t0, EVEN)
        if SHARDS >= 2:
            shift = SHARD_SIZE
            t1 = _add_step(x_rows + shift, weight_rows + shift, rows_in, columns_in, inner, SHARD_SIZE, t1, EVEN)
        if SHARDS >= 4:
            shift = 2 * SHARD_SIZE
            t2 = _add_step(x_rows + shift, weight_rows + shift, rows_in, columns_in, inner, SHARD_SIZE, t2, EVEN)
            shift = 3 * SHARD_SIZE
            t3 = _add_step(x_rows + shift, weight_rows + shift, rows_in, columns_in, inner, SHARD_SIZE, t3, EVEN)
        if SHARDS >= 8:
            shift = 4 * SHARD_SIZE
            t4 = _add_step(x_rows + shift, weight_rows + shift, rows_in, columns_in, inner, SHARD_SIZE, t4, EVEN)
            shift = 5 * SHARD_SIZE
            t5 = _add_step(x_rows + shift, weight_rows + shift, rows_in, columns_in, inner, SHARD_SIZE, t5, EVEN)
            shift = 6 * SHARD_SIZE
            t6 = _add_step(x_rows + shift, weight_rows + shift, rows_in, columns_in, inner, SHARD_SIZE, t6, EVEN)
            shift = 7 * SHARD_SIZE
            t7 = _add_step(x_rows + shift, weight_rows + shift, rows_in, columns_in, inner, SHARD_SIZE, t7, EVEN)
    if DEPENDENT:
        if LAUNCH == 2:
            gdc_launch_dependents()
    if SHARDS == 1:
        total = t0
    elif SHARDS == 2:
        total = t0 + t1
    elif SHARDS == 4:
        total = (t0 + t1) + (t2 + t3)
    else:
        total = ((t0 + t1) + (t2 + t3)) + ((t4 + t5) + (t6 + t7))
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns_in, other=0.0).to(tl.float32)[:, None]
    outputs = output + rows[None, :].to(tl.int64) * N + columns[:, None]
    tl.store(outputs, total.to(output.dtype.element_ty), mask=rows_in[None, :] & columns_in[:, None])


@triton.jit
def _shard_sum(
    x_rows, weight_rows, rows_in, columns_in, first, SHARD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: one shard of the inputs."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, SHARD_SIZE, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        if EVEN:
            left = tl.load(x_rows + (first + inner)[None, :], mask=rows_in[:, None], other=0.0)
            right = tl.load(weight_rows + (first + inner)[None, :], mask=columns_in[:, None], other=0.0)
        else:
            inside = inner[None, :] < SHARD_SIZE
            left = tl.load(x_rows + (first + inner)[None, :], mask=rows_in[:, None] & inside, other=0.0)
            right = tl.load(weight_rows + (first + inner)[None, :], mask=columns_in[:, None] & inside, other=0.0)
        total = tl.dot(left, right.T, total, input_precision="ieee")
    return total


@triton.jit
def _tree_sum(
    x_rows, weight_rows, rows_in, columns_in, first, SHARD_SIZE: tl.constexpr,
    SHARDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The node of the tree over SHARDS shards, from input `first` on."""
    if SHARDS == 1:
        return _shard_sum(x_rows, weight_rows, rows_in, columns_in, first, SHARD_SIZE, BLOCK_M, BLOCK_N, BLOCK_K, EVEN)
    else:
        half: tl.constexpr = SHARDS // 2
        left = _tree_sum(
            x_rows, weight_rows, rows_in, columns_in, first, SHARD_SIZE, half, BLOCK_M, BLOCK_N, BLOCK_K, EVEN
        )
        right = _tree_sum(
            x_rows, weight_rows, rows_in, columns_in, first + half * SHARD_SIZE, SHARD_SIZE,
            half, BLOCK_M, BLOCK_N, BLOCK_K, EVEN,
        )  # fmt: skip
        return left + right


@triton.jit(do_not_specialize=["M"])
def _many_rows_kernel(
    x, weight, bias, output, M, N, x_stride, weight_stride,
    SHARD_SIZE: tl.constexpr, SHARDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A tile and SHARDS shards from number program_id(1) * SHARDS on, one after the other. output [G, M, N]."""
    num_tiles_m, num_tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # Tiles that run at the same time share rows and columns, so that the L2 cache serves them.
    tile = tl.program_id(0)
    band = tile // (GROUP_M * num_tiles_n)
    height = min(num_tiles_m - band * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * num_tiles_n)
    rows = (band * GROUP_M + within % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (within // height).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_in, columns_in = rows < M, columns < N
    first = tl.program_id(1) * SHARDS * SHARD_SIZE
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    total = _tree_sum(
        x + rows[:, None] * x_stride, weight + columns[:, None] * weight_stride, rows_in, columns_in,
        first, SHARD_SIZE, SHARDS, BLOCK_M, BLOCK_N, BLOCK_K, EVEN,
    )  # fmt: skip
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns_in, other=0.0).to(tl.float32)[None, :]
    outputs = output + (tl.program_id(1).to(tl.int64) * M + rows[:, None]) * N + columns[None, :]
    tl.store(outputs, total.to(output.dtype.element_ty), mask=rows_in[:, None] & columns_in[None, :])


@triton.jit
def _sum_nodes_kernel(
    nodes, bias, output, size, N, GROUPS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The upper part of the tree: nodes [G, M * N], fp32."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.load(nodes + index, mask=inside, other=0.0) + tl.load(nodes + size + index, mask=inside, other=0.0)
    if GROUPS >= 4:
        third = tl.load(nodes + 2 * size + index, mask=inside, other=0.0)
        total += third + tl.load(nodes + 3 * size + index, mask=inside, other=0.0)
    if GROUPS >= 8:
        fifth = tl.load(nodes + 4 * size + index, mask=inside, other=0.0)
        left = fifth + tl.load(nodes + 5 * size + index, mask=inside, other=0.0)
        seventh = tl.load(nodes + 6 * size + index, mask=inside, other=0.0)
        right = seventh + tl.load(nodes + 7 * size + index, mask=inside, other=0.0)
        total += left + right
    if HAS_BIAS:
        total += tl.load(bias + index % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + index, total.to(output.dtype.element_ty), mask=inside)


def fixed_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    num_shards: int = 1,
    output_dtype: torch.dtype | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """x [M, K] times weight [N, K] transposed, plus bias [N] -> [M, N], in output_dtype (None: x's).

    num_shards: 1, 2, 4 or 8 pieces of K, summed in the fixed tree; they divide K. tiles: None chooses by shape.
    """
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0]
    assert num_shards in (1, 2, 4, 8) and num_inputs % num_shards == 0, (num_shards, num_inputs)
    output = torch.empty(num_rows, num_outputs, dtype=output_dtype or x.dtype, device=x.device)
    if num_rows == 0 or num_outputs == 0:
        return output
    if x.stride(1) != 1:
        x = x.contiguous()
    tiles = tiles or choose_tiles(num_rows, num_outputs, num_inputs, num_shards, x.dtype)
    launch = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, **launch_options(x.device)}
    dependent = has_dependent_launch(x.device)
    shard_size = num_inputs // num_shards
    common = {
        "SHARD_SIZE": shard_size, "SHARDS": num_shards // tiles.groups, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k, "EVEN": shard_size % tiles.block_k == 0, "DEPENDENT": dependent,
    }  # fmt: skip
    grid_m, grid_n = triton.cdiv(num_rows, tiles.block_m), triton.cdiv(num_outputs, tiles.block_n)
    if tiles.side_by_side:
        _few_rows_kernel[(grid_n, grid_m)](
            x, weight, bias, output, num_rows, num_outputs, x.stride(0), weight.stride(0),
            LAUNCH=tiles.launch, PREFETCH=tiles.prefetch, HAS_BIAS=bias is not None, **common, **launch,
        )  # fmt: skip
        return output
    nodes = output
    if tiles.groups > 1:
        nodes = torch.empty(tiles.groups, num_rows, num_outputs, dtype=torch.float32, device=x.device)
    _many_rows_kernel[(grid_m * grid_n, tiles.groups)](
        x, weight, bias, nodes, num_rows, num_outputs, x.stride(0), weight.stride(0),
        GROUP_M=8, HAS_BIAS=bias is not None and tiles.groups == 1, **common, **launch,
    )  # fmt: skip
    if tiles.groups > 1:
        _sum_nodes_kernel[(triton.cdiv(output.numel(), 1024),)](
            nodes, bias, output, output.numel(), num_outputs, GROUPS=tiles.groups, BLOCK=1024,
            HAS_BIAS=bias is not None, DEPENDENT=dependent, num_warps=4, **launch_options(x.device),
        )  # fmt: skip
    return output


def choose_tiles(num_rows: int, num_outputs: int, num_inputs: int, num_shards: int, dtype: torch.dtype) -> Tiles:
    """By speed alone (see the module's head)."""
    if dtype is torch.float32:  # plain fused multiply-adds
        if num_rows <= FEW_ROWS:
            return Tiles(16, 32, 32, 4, 2, side_by_side=True)
        return Tiles(64, 64, 32, 8, 2)
    if num_rows <= FEW_ROWS:
        block_m = 8 if num_rows <= 8 else 16 if num_rows <= 16 else 32
        return Tiles(block_m, 32, 256 // num_shards, 4, 4, side_by_side=True)
    if num_shards == 1:
        if num_rows <= 64:
            return Tiles(64, 64, 64, 4, 4)
        return Tiles(128, 128, 64, 8, 4)
    if num_rows <= 64:
        return Tiles(64, 64, 64, 4, 4, groups=min(4, num_shards))
    groups = 1 if num_rows > 1024 else min(4 if num_rows <= 128 else 2, num_shards)
    return Tiles(128, 128, 64, 8, 4, groups=groups)
