"""Causal attention of prompts over a paged KV cache: all pieces of prompts of a step in one launch, with earlier
context and windows. Used by the paged backend.

T tokens, Hq query heads, Hk KV heads, G = Hq / Hk, D head size, N blocks, B blocks a row of the table.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from shoal.kernels.cache_format import cache_cells, cache_format, decode
from shoal.kernels.scores import LOG2_E, capped, score_factors
from shoal.kernels.support import has_large_tiles


@triton.jit
def _attend(
    sums, top, total, rows_query, begin, end, keys, values, blocks, position, columns, whole, context, lowest,
    factor, cap, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    WINDOWED: tl.constexpr, PRECISION: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Keys begin … end of one tile of rows. MASKED: some rows do not see some of them."""
    in_head = whole < D
    # Block ids are read one turn ahead: were they read where they are used, keys and values would wait for them.
    block = tl.load(blocks + (begin + columns) // BLOCK_SIZE, mask=begin + columns < end, other=0)
    for start in range(begin, end, BLOCK_N):
        seen = start + columns
        cells = block.to(tl.int64) * (BLOCK_SIZE * D) + (seen % BLOCK_SIZE) * D
        ahead = seen + BLOCK_N
        block = tl.load(blocks + ahead // BLOCK_SIZE, mask=ahead < end, other=0)
        inside = in_head[None, :]
        if MASKED:
            inside = inside & (seen < context)[:, None]
        key = tl.load(keys + cells[:, None] + whole[None, :], mask=inside, other=0.0)
        key = decode(key, rows_query.dtype, FORMAT)
        scores = capped(tl.dot(rows_query, tl.trans(key), input_precision=PRECISION), factor, cap)
        if MASKED:
            visible = seen[None, :] <= position[:, None]
            if WINDOWED:
                visible &= seen[None, :] >= lowest[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        base = new_top
        if WINDOWED:  # a row that has seen nothing yet has no maximum
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, axis=1)
        value = tl.load(values + cells[:, None] + whole[None, :], mask=inside, other=0.0)
        value = decode(value, rows_query.dtype, FORMAT)
        sums = sums * shrink[:, None]
        sums = tl.dot(weights.to(value.dtype), value, sums, input_precision=PRECISION)
        top = new_top
    return sums, top, total


@triton.jit(do_not_specialize=["window", "table_stride"])
def _prefill_kernel(
    query, output, keys, values, block_tables, tiles, query_stride, query_head, cache_head, table_stride, factor,
    window, cap, sinks, value_scale, NUM_KV_HEADS: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Program (KV head, tile): BLOCK_M // G new tokens of a sequence, with all heads of the group."""
    kv_head, tile = tl.program_id(0), tl.program_id(1)
    table_row = tl.load(tiles + tile * 4)
    first_token = tl.load(tiles + tile * 4 + 1)
    num_tokens = tl.load(tiles + tile * 4 + 2)
    first_position = tl.load(tiles + tile * 4 + 3)
    context = first_position + num_tokens  # as far as this tile sees
    rows = tl.arange(0, BLOCK_M)
    offset, head = rows // G, kv_head * G + rows % G
    position = first_position + offset
    live = offset < num_tokens
    whole, columns = tl.arange(0, D_PAD), tl.arange(0, BLOCK_N)
    token = (first_token + offset).to(tl.int64)
    held = live[:, None] & (whole < D)[None, :]
    source = query + (token * query_stride + head * query_head)[:, None] + whole[None, :]
    rows_query = tl.load(source, mask=held, other=0.0)
    keys += kv_head.to(tl.int64) * cache_head
    values += kv_head.to(tl.int64) * cache_head
    blocks = block_tables + table_row.to(tl.int64) * table_stride
    sums = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:  # as a first key, of a value of zeros
        top = tl.load(sinks + head).to(tl.float32) * LOG2_E
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    lowest = position
    begin = 0
    plain_begin = 0
    if WINDOWED:
        lowest = tl.maximum(position - window + 1, 0)
        begin = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
        plain_begin = tl.cdiv(tl.maximum(context - window, 0), BLOCK_N) * BLOCK_N
    plain_end = (first_position + 1) // BLOCK_N * BLOCK_N
    if WINDOWED:
        plain_begin = tl.minimum(plain_begin, tl.cdiv(context, BLOCK_N) * BLOCK_N)
        plain_end = tl.maximum(plain_end, plain_begin)
        sums, top, total = _attend(
            sums, top, total, rows_query, begin, plain_begin, keys, values, blocks, position, columns, whole, context,
            lowest, factor, cap, D, BLOCK_SIZE, BLOCK_N, True, True, PRECISION, FORMAT,
        )  # fmt: skip
    sums, top, total = _attend(
        sums, top, total, rows_query, plain_begin, plain_end, keys, values, blocks, position, columns, whole, context,
        lowest, factor, cap, D, BLOCK_SIZE, BLOCK_N, False, WINDOWED, PRECISION, FORMAT,
    )  # fmt: skip
    sums, top, total = _attend(
        sums, top, total, rows_query, plain_end, context, keys, values, blocks, position, columns, whole, context,
        lowest, factor, cap, D, BLOCK_SIZE, BLOCK_N, True, WINDOWED, PRECISION, FORMAT,
    )  # fmt: skip
    sums = sums / total[:, None]
    if value_scale is not None:
        sums *= value_scale
    target = output + ((token * (NUM_KV_HEADS * G) + head) * D)[:, None] + whole[None, :]
    tl.store(target, sums.to(output.dtype.element_ty), mask=held)


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Tile sizes of the kernel for a head size and type: rows are tokens times G."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def tile_shape(head_dim: int, dtype: torch.dtype, device: torch.device) -> Shape:
    """H100, 32 query heads, 8 KV heads, D 128, bfloat16 (2026-11): 376 TFLOP/s at 2 prompts of 4096 tokens, 279 at 8 of
    1000, the best of nine shapes; PyTorch's own flash kernel has 311 and 203, cuDNN's 537 and 412 (dense, equal lengths
    only). Older GPUs have no asynchronous products, and some have less shared memory."""
    if dtype is torch.float32:
        return Shape(32, 32 if head_dim <= 128 else 16, 4, 1)
    if not has_large_tiles(device):
        return Shape(128, 32, 8, 2) if head_dim <= 128 else Shape(64, 32, 8, 1)
    return Shape(128, 32, 4, 3) if head_dim <= 128 else Shape(128, 32, 8, 2)


def tile_rows(group: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of the kernel's tile for G query heads a KV head: a token's heads are in one tile, however many they are."""
    return max(tile_shape(head_dim, dtype, device).rows, triton.next_power_of_2(group))


def prefill_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    block_tables: torch.Tensor,
    tiles: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Attend with the tokens that `tiles` name, whose keys and values are in the cache: fills their rows of `output`.

    query [T, Hq, D]: any strides but the last; kv_cache [2, Hk, N, block_size, D]; output [T, Hq * D], contiguous;
    block_tables [rows, B]: int32; tiles: as `attention.sequences.plan_tiles` makes them, for `tile_rows(…) // G`
    tokens. softcap, sinks [Hq], key_scale, value_scale: as in `AttentionForm`.
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = kv_cache.shape[1], kv_cache.shape[3]
    group = num_heads // num_kv_heads
    shape = tile_shape(head_dim, query.dtype, query.device)
    cache, form = cache_cells(kv_cache), cache_format(kv_cache)
    factor, cap = score_factors(scale * key_scale if form else scale, softcap)
    _prefill_kernel[(num_kv_heads, tiles.shape[0])](
        query, output, cache[0], cache[1], block_tables, tiles, query.stride(0), query.stride(1),
        kv_cache.stride(1), block_tables.stride(0), factor, sliding_window or 0,
        cap, sinks, value_scale if form else None,
        NUM_KV_HEADS=num_kv_heads, G=group, D=head_dim, D_PAD=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=block_size, BLOCK_M=tile_rows(group, head_dim, query.dtype, query.device),
        BLOCK_N=shape.columns, WINDOWED=sliding_window is not None,
        PRECISION="ieee" if query.dtype is torch.float32 else "tf32", FORMAT=form,
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
