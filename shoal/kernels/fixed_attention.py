"""Paged attention whose bits for a query row depend on that query and its context alone. Called by
attention/deterministic_cuda.py; the same kernel serves prompts and decodes.

A row is defined as: its keys are cut at absolute positions into splits of SPLIT. Within a split a softmax runs over
tiles of TILE keys, from the split's beginning; its sum of weights is a matrix product with ones, so that no layout of
threads shows in it. The splits are merged in order, by one formula with explicit fused multiply-adds (the compiler may
not fuse others). A tile or split that is masked for a row leaves its state as it is, to the bit; so how many rows share
a tile of queries, which splits a program walks and whether they are merged in its registers or by a second kernel does
not matter.

T tokens, Hq query heads, Hk KV heads, G = Hq / Hk, D head size, N blocks of the cache, B blocks a row of the table,
R rows of a query tile (tokens times G), I query tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoal.kernels.cache_format import cache_cells, cache_format, decode
from shoal.kernels.launch import has_dependent_launch, launch_options
from shoal.kernels.scores import LOG2_E, capped, score_factors

SPLIT = 256
# Programs in flight that a GPU of 132 processors is filled with.
_ENOUGH_PROGRAMS = 264
# A load waits for its block's number, so two stages of the pipeline are one load in flight. H100 (3.0 TB/s of copy
# bandwidth, 2026-11), Llama-8B's heads, bf16: decodes of 256 x 715 tokens 259 us (2.9 TB/s), 64 x 715 72 us, 1 x 256
# 6.6 us; prompts of 2 x 4096 1.13 ms (243 TFLOP/s, PyTorch's flash attention 580).
_NUM_STAGES = 5


@triton.jit
def _exponent(top):
    """What is subtracted from scores before exp2: 0 while no key was seen, so that nothing becomes NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _merge(top, total, sums, part_top, part_total, part_sums):
    """State [R], [R], [R, D] joined with that of the next split. tops are scaled to powers of two."""
    new_top = tl.maximum(top, part_top)
    base = _exponent(new_top)
    shrink, weight = tl.exp2(top - base), tl.exp2(part_top - base)
    total = tl.fma(total, shrink, part_total * weight)
    sums = tl.fma(sums, tl.broadcast_to(shrink[:, None], sums.shape), part_sums * weight[:, None])
    return new_top, total, sums


@triton.jit
def _decode_in_order(x, TYPE: tl.constexpr, FORMAT: tl.constexpr, DEPENDENT: tl.constexpr):
    """`decode` for a product that takes its terms in the order of 16-bit operands. Where the compiler sees that they
    were bytes, small tiles (mma) take them in another order than large ones (wgmma, from sm_90); so it may not see."""
    found = decode(x, TYPE, FORMAT)
    if DEPENDENT and FORMAT != 0 and TYPE.primitive_bitwidth == 16:
        found = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [found], dtype=found.dtype, is_pure=False, pack=2)
    return found


@triton.jit
def _store_partial(partial_sums, partial_stats, own, rows, whole, top, total, sums, G, D, D_PAD: tl.constexpr):
    """own: number of the split of this sequence and KV head."""
    own = own.to(tl.int64) * G
    inside = (rows < G)[:, None] & (whole < D)[None, :]
    tl.store(partial_sums + (own + rows[:, None]) * D_PAD + whole[None, :], sums, mask=inside)
    tl.store(partial_stats + (own + rows) * 2, top, mask=rows < G)
    tl.store(partial_stats + (own + rows) * 2 + 1, total, mask=rows < G)


@triton.jit(
    do_not_specialize=["window", "max_splits", "table_stride"],
    do_not_specialize_on_alignment=["table_rows", "seq_lens", "tokens"],
)
def _attend_kernel(
    query, keys, values, output, block_tables, tiles, table_rows, seq_lens, tokens, partial_sums, partial_stats,
    query_stride, query_head, cache_head, table_stride, factor, window, max_splits, cap, sinks, value_scale,
    DECODE: tl.constexpr, PARTIAL: tl.constexpr, NUM_KV_HEADS: tl.constexpr, G: tl.constexpr,
    R: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, SPLIT_KEYS: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
    FORMAT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (query tile, KV head, chunk of splits). PARTIAL (decodes only): each split's state goes to memory."""
    item, kv_head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    if DECODE:
        table_row = tl.load(table_rows + item)
        end = tl.load(seq_lens + item)  # 0: no sequence
        num_tokens = tl.minimum(end, 1)
        first_position = end - num_tokens
        first_token = item
        if tokens is not None:
            first_token = tl.load(tokens + item)
    else:
        table_row = tl.load(tiles + item * 4)
        first_token = tl.load(tiles + item * 4 + 1)
        num_tokens = tl.load(tiles + item * 4 + 2)
        first_position = tl.load(tiles + item * 4 + 3)
    end = first_position + num_tokens
    first_split = 0
    if WINDOWED:
        first_split = tl.maximum(first_position - window + 1, 0) // SPLIT_KEYS
    last_split = tl.cdiv(end, SPLIT_KEYS)
    begin_split = first_split
    if PARTIAL:
        each = tl.cdiv(last_split - first_split, tl.num_programs(2))
        begin_split = first_split + chunk * each
        last_split = tl.minimum(begin_split + each, last_split)
        if begin_split >= last_split:
            return
    begin = begin_split * SPLIT_KEYS
    stop = tl.minimum(end, last_split * SPLIT_KEYS)

    rows, whole, columns = tl.arange(0, R), tl.arange(0, D_PAD), tl.arange(0, TILE)
    own_token, own_head = rows // G, kv_head * G + rows % G
    live = own_token < num_tokens
    last_seen = first_position + own_token
    token = (first_token + own_token).to(tl.int64)
    source = query + token[:, None] * query_stride + own_head[:, None] * query_head + whole[None, :]
    heads = tl.load(source, mask=live[:, None] & (whole < D)[None, :], other=0.0)
    keys += kv_head.to(tl.int64) * cache_head
    values += kv_head.to(tl.int64) * cache_head
    blocks = block_tables + table_row.to(tl.int64) * table_stride
    ones = tl.full([TILE, 16], 1.0, heads.dtype)

    merged_top = tl.full([R], float("-inf"), tl.float32)
    merged_total = tl.zeros([R], tl.float32)
    merged_sums = tl.zeros([R, D_PAD], tl.float32)
    if sinks is not None and not PARTIAL:  # a split before all others, whose values are zeros
        merged_top = tl.load(sinks + own_head).to(tl.float32) * LOG2_E
        merged_total = tl.full([R], 1.0, tl.float32)
    scale_log2 = factor
    if cap is not None:
        scale_log2 = 1.0
    top = tl.full([R], float("-inf"), tl.float32)
    totals = tl.zeros([R, 16], tl.float32)  # all columns alike
    sums = tl.zeros([R, D_PAD], tl.float32)
    for start in range(begin, stop, TILE):
        position = start + columns
        inside = position < stop
        block = tl.load(blocks + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        cells = (block * BLOCK_SIZE + position % BLOCK_SIZE)[:, None] * D + whole[None, :]
        read = inside[:, None] & (whole < D)[None, :]
        key = _decode_in_order(tl.load(keys + cells, mask=read, other=0.0), heads.dtype, FORMAT, DEPENDENT)
        scores = tl.dot(heads, key.T, input_precision=PRECISION)
        if cap is not None:
            scores = capped(scores, factor, cap)
        value = _decode_in_order(tl.load(values + cells, mask=read, other=0.0), heads.dtype, FORMAT, DEPENDENT)
        seen = inside[None, :] & (position[None, :] <= last_seen[:, None])
        if WINDOWED:
            seen &= position[None, :] > last_seen[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * scale_log2)
        base = _exponent(new_top)
        weights = tl.exp2(scores * scale_log2 - base[:, None]).to(value.dtype)
        shrink = tl.exp2(top - base)
        totals = tl.dot(weights, ones, totals * shrink[:, None], input_precision=PRECISION)
        sums = tl.dot(weights, value, sums * shrink[:, None], input_precision=PRECISION)
        top = new_top
        if ((start + TILE) % SPLIT_KEYS == 0) | (start + TILE >= stop):
            total = tl.max(totals, axis=1)
            if PARTIAL:
                own = (item * NUM_KV_HEADS + kv_head) * max_splits + start // SPLIT_KEYS - first_split
                _store_partial(partial_sums, partial_stats, own, rows, whole, top, total, sums, G, D, D_PAD)
            else:
                merged_top, merged_total, merged_sums = _merge(merged_top, merged_total, merged_sums, top, total, sums)
            top = tl.full([R], float("-inf"), tl.float32)
            totals = tl.zeros([R, 16], tl.float32)
            sums = tl.zeros([R, D_PAD], tl.float32)
    if not PARTIAL:
        target = output + (token[:, None] * (NUM_KV_HEADS * G) + own_head[:, None]) * D + whole[None, :]
        merged_total = tl.where(live, merged_total, 1.0)
        result = merged_sums / merged_total[:, None]
        if value_scale is not None:
            result *= value_scale
        tl.store(target, result.to(output.dtype.element_ty), mask=live[:, None] & (whole < D)[None, :])


@triton.jit(do_not_specialize=["window", "max_splits"], do_not_specialize_on_alignment=["seq_lens", "tokens"])
def _merge_kernel(
    output, seq_lens, tokens, partial_sums, partial_stats, window, max_splits, sinks, value_scale,
    NUM_KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, SPLIT_KEYS: tl.constexpr,
    WINDOWED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (sequence, query head): its splits, in order."""
    item, head = tl.program_id(0), tl.program_id(1)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    position = tl.load(seq_lens + item) - 1
    if position < 0:
        return
    first_split = 0
    if WINDOWED:
        first_split = tl.maximum(position - window + 1, 0) // SPLIT_KEYS
    num_splits = position // SPLIT_KEYS + 1 - first_split
    token = item
    if tokens is not None:
        token = tl.load(tokens + item)
    row, whole = tl.arange(0, 1), tl.arange(0, D_PAD)
    group = (item * NUM_KV_HEADS + head // G) * max_splits
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([1, D_PAD], tl.float32)
    if sinks is not None:
        top = tl.load(sinks + head + row).to(tl.float32) * LOG2_E
        total = tl.full([1], 1.0, tl.float32)
    for split in range(0, num_splits):
        own = (group + split).to(tl.int64) * G + head % G
        part_top = tl.load(partial_stats + own * 2 + row)
        part_total = tl.load(partial_stats + own * 2 + 1 + row)
        part_sums = tl.load(partial_sums + own * D_PAD + whole[None, :], mask=(whole < D)[None, :], other=0.0)
        top, total, sums = _merge(top, total, sums, part_top, part_total, part_sums)
    target = output + (token.to(tl.int64) * (NUM_KV_HEADS * G) + head) * D + whole[None, :]
    result = sums / total[:, None]
    if value_scale is not None:
        result *= value_scale
    tl.store(target, result.to(output.dtype.element_ty), mask=(whole < D)[None, :])


def _tile_keys(dtype: torch.dtype, head_dim: int) -> int:
    """Part of the definition: by dtype and head size alone."""
    return 32 if dtype is torch.float32 or head_dim > 128 else 64


def _query_rows(dtype: torch.dtype, head_dim: int) -> int:
    """Rows of a prompt's tile: as many as the registers hold."""
    return 32 if dtype is torch.float32 or head_dim > 128 else 128


def _num_stages(dtype: torch.dtype, head_dim: int) -> int:
    """As many as fit into 99 KiB of shared memory, as the smaller GPUs have; no bit depends on it."""
    return 1 if dtype is torch.float32 and head_dim > 128 else _NUM_STAGES


def query_tile_tokens(group: int, dtype: torch.dtype, head_dim: int) -> int:
    """Tokens of one prompt that `fixed_prefill` puts in a tile, for G query heads a KV head."""
    return max(1, _query_rows(dtype, head_dim) // group)


def decode_scratch_bytes(num_heads: int, num_kv_heads: int, head_dim: int, context: int) -> int:
    """What the splits of `fixed_decode` leave for each other at most, for sequences of up to `context` tokens."""
    # With more of them than this each is walked by one program, which keeps its state.
    num_pairs = _ENOUGH_PROGRAMS // 2
    row_bytes = 4 * (max(16, triton.next_power_of_2(head_dim)) + 2)
    return num_pairs * -(-context // SPLIT) * (num_heads // num_kv_heads) * row_bytes


def fixed_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    block_tables: torch.Tensor,
    table_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    tokens: torch.Tensor | None = None,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Attention of one new token a sequence, whose key and value are in the cache: fills its row of `output`.

    query [T, Hq, D]; kv_cache [2, Hk, N, block_size, D]; output [T, Hq * D], contiguous; block_tables [rows, B], int32.
    table_rows, seq_lens [S]: int32. tokens [S]: int32, which token is the sequence's; None: token s. softcap, sinks
    [Hq], key_scale, value_scale: as in `AttentionForm`. Launches depend on shapes alone.
    """
    num_sequences, num_kv_heads = seq_lens.shape[0], kv_cache.shape[1]
    num_heads, head_dim = query.shape[1:]
    group = num_heads // num_kv_heads
    context = block_tables.shape[1] * kv_cache.shape[3]
    if sliding_window is not None:
        context = min(context, sliding_window + SPLIT)
    max_splits = -(-context // SPLIT)
    chunks = max(1, min(max_splits, _ENOUGH_PROGRAMS // (num_sequences * num_kv_heads)))
    sums = stats = None
    if chunks > 1:
        shape = (num_sequences * num_kv_heads * max_splits * group, max(16, triton.next_power_of_2(head_dim)))
        sums = torch.empty(shape, dtype=torch.float32, device=query.device)
        stats = torch.empty(shape[0], 2, dtype=torch.float32, device=query.device)
    rows = max(16, triton.next_power_of_2(group))
    factors, scaled_by = _cache_factors(kv_cache, scale, softcap, key_scale, value_scale)
    _launch(
        query, kv_cache, output, block_tables, None, table_rows, seq_lens, tokens, sums, stats,
        factors, sliding_window, max_splits, chunks, rows, num_sequences, sinks, scaled_by,
    )  # fmt: skip
    if chunks > 1:
        _merge_kernel[(num_sequences, num_heads)](
            output, seq_lens, tokens, sums, stats, sliding_window or 0, max_splits, sinks, scaled_by,
            NUM_KV_HEADS=num_kv_heads, G=group, D=head_dim, D_PAD=max(16, triton.next_power_of_2(head_dim)),
            SPLIT_KEYS=SPLIT, WINDOWED=sliding_window is not None, DEPENDENT=has_dependent_launch(query.device),
            num_warps=1, enable_fp_fusion=False, **launch_options(query.device),
        )  # fmt: skip


def fixed_prefill(
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
    """Attention of prompts' new tokens, whose keys and values are in the cache: fills their rows of `output`.

    tiles [I, 4]: as `attention.sequences.plan_tiles` makes them, for `query_tile_tokens`. The rest as in
    `fixed_decode`.
    """
    group = query.shape[1] // kv_cache.shape[1]
    rows = max(_query_rows(query.dtype, query.shape[2]), triton.next_power_of_2(group))
    factors, scaled_by = _cache_factors(kv_cache, scale, softcap, key_scale, value_scale)
    _launch(
        query, kv_cache, output, block_tables, tiles, None, None, None, None, None,
        factors, sliding_window, 0, 1, rows, tiles.shape[0], sinks, scaled_by,
    )  # fmt: skip


def _cache_factors(
    kv_cache: torch.Tensor, scale: float, softcap: float | None, key_scale: float, value_scale: float
) -> tuple[tuple[float, float | None], float | None]:
    """`score_factors` with the scale of the cache's keys, and that of its values where they have one."""
    if not cache_format(kv_cache):
        return score_factors(scale, softcap), None
    return score_factors(scale * key_scale, softcap), value_scale


def _launch(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    block_tables: torch.Tensor,
    tiles: torch.Tensor | None,
    table_rows: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    tokens: torch.Tensor | None,
    sums: torch.Tensor | None,
    stats: torch.Tensor | None,
    factors: tuple[float, float | None],
    window: int | None,
    max_splits: int,
    chunks: int,
    rows: int,
    num_items: int,
    sinks: torch.Tensor | None,
    value_scale: float | None,
) -> None:
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = kv_cache.shape[1]
    group = num_heads // num_kv_heads
    assert query.stride(2) == 1 and kv_cache[0, 0].is_contiguous() and output.is_contiguous()
    cache = cache_cells(kv_cache)
    _attend_kernel[(num_items, num_kv_heads, chunks)](
        query, cache[0], cache[1], output, block_tables, tiles, table_rows, seq_lens, tokens, sums, stats,
        query.stride(0), query.stride(1), kv_cache.stride(1), block_tables.stride(0), factors[0], window or 0,
        max_splits, factors[1], sinks, value_scale,
        DECODE=tiles is None, PARTIAL=chunks > 1, NUM_KV_HEADS=num_kv_heads, G=group, R=rows,
        TOKENS=1 if tiles is None else rows // group, D=head_dim, D_PAD=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=kv_cache.shape[3], TILE=_tile_keys(query.dtype, head_dim), SPLIT_KEYS=SPLIT,
        WINDOWED=window is not None, PRECISION="ieee" if query.dtype is torch.float32 else "tf32",
        FORMAT=cache_format(kv_cache), DEPENDENT=has_dependent_launch(query.device), enable_fp_fusion=False,
        num_warps=4 if rows == 32 else 8, num_stages=_num_stages(query.dtype, head_dim), **launch_options(query.device),
    )  # fmt: skip
