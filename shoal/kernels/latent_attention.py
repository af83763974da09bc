"""Attention of all heads to one row a token (multi-head latent attention, DeepSeek-V2, 2024) over a paged cache: tokens
of prompts and decodes, split over the context where there are few. Called by both attention backends with kernels.

A tile of queries is some tokens of a sequence times some of their heads: a row of the cache is loaded once for all of
them, and its beginning once more as their value. `fixed`: keys are cut at absolute positions, and the pieces are merged
in order, as in `fixed_attention`, whose reasons for having the same bits in any batch hold here too.

T tokens, Hq query heads, L numbers of a cached row, V of them its value, N blocks of the cache, R rows of a tile.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoal.kernels.cache_format import cache_cells, cache_format, decode, encode
from shoal.kernels.launch import has_dependent_launch, launch_options
from shoal.kernels.scores import score_factors
from shoal.kernels.support import has_large_tiles

# Keys of a split in fixed order, and programs that fill a GPU then.
FIXED_SPLIT, _ENOUGH_PROGRAMS = 512, 264
# Otherwise: most splits of a sequence (to add them up takes time too), and how many are added up at a time.
_MOST_SPLITS, _PARTS = 64, 16


@triton.jit
def _write_kernel(latent, cache, slots, stride, inverse, L: tl.constexpr, L_PAD: tl.constexpr, FORMAT: tl.constexpr):
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, L_PAD)
    x = tl.load(latent + token * stride + column, mask=column < L, other=0.0)
    tl.store(cache + tl.load(slots + token) * L + column, encode(x, inverse, FORMAT), mask=column < L)


@triton.jit
def _base(top):
    """What is subtracted from scores before exp2: 0 while no key was seen, so that nothing becomes NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _merge(top, total, sums, part_top, part_total, part_sums):
    """State [R], [R], [R, V] joined with that of the next split."""
    new_top = tl.maximum(top, part_top)
    base = _base(new_top)
    shrink, weight = tl.exp2(top - base), tl.exp2(part_top - base)
    total = tl.fma(total, shrink, part_total * weight)
    sums = tl.fma(sums, tl.broadcast_to(shrink[:, None], sums.shape), part_sums * weight[:, None])
    return new_top, total, sums


@triton.jit
def _split_keys(end, max_splits, TILE: tl.constexpr, FIXED: tl.constexpr, FIXED_KEYS: tl.constexpr):
    """Keys of a split of a sequence of `end` tokens, a multiple of TILE."""
    split_keys = FIXED_KEYS
    if not FIXED:
        split_keys = tl.maximum(tl.cdiv(tl.cdiv(end, TILE), max_splits), 2) * TILE
    return split_keys


@triton.jit
def _store_partial(partial_sums, partial_stats, own, live, in_first, top, total, sums, V_PAD: tl.constexpr):
    """own [R]: the number of the split of this sequence and head."""
    place = partial_sums + own[:, None] * V_PAD + tl.arange(0, V_PAD)[None, :]
    tl.store(place, sums, mask=live[:, None] & in_first[None, :])
    tl.store(partial_stats + own * 2, top, mask=live)
    tl.store(partial_stats + own * 2 + 1, total, mask=live)


@triton.jit(
    do_not_specialize=["max_splits", "table_stride"],
    do_not_specialize_on_alignment=["table_rows", "seq_lens", "tokens"],
)
def _latent_kernel(
    query, cache, output, block_tables, tiles, table_rows, seq_lens, tokens, partial_sums, partial_stats,
    query_stride, query_head, table_stride, factor, max_splits, value_scale,
    DECODE: tl.constexpr, PARTIAL: tl.constexpr, NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr,
    L: tl.constexpr, V: tl.constexpr, V_PAD: tl.constexpr, REST_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, FIXED: tl.constexpr, FIXED_KEYS: tl.constexpr, PRECISION: tl.constexpr,
    FORMAT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, HEADS heads, chunk of splits). PARTIAL (decodes): a split's state goes to memory."""
    item, head_chunk, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
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
    split_keys = _split_keys(end, max_splits, TILE, FIXED, FIXED_KEYS)
    begin_split = 0
    last_split = tl.cdiv(end, split_keys)
    if PARTIAL:
        each = tl.cdiv(last_split, tl.num_programs(2))
        begin_split = chunk * each
        last_split = tl.minimum(begin_split + each, last_split)
        if begin_split >= last_split:
            return
    begin = begin_split * split_keys
    stop = tl.minimum(end, last_split * split_keys)

    rows, columns = tl.arange(0, R), tl.arange(0, TILE)
    own_token, head = rows // HEADS, head_chunk * HEADS + rows % HEADS
    live = (own_token < num_tokens) & (head < NUM_HEADS)
    last_seen = first_position + own_token
    token = (first_token + own_token).to(tl.int64)
    first, rest = tl.arange(0, V_PAD), V + tl.arange(0, REST_PAD)
    in_first, in_rest = first < V, rest < L
    source = query + (token * query_stride + head * query_head)[:, None]
    query_first = tl.load(source + first[None, :], mask=live[:, None] & in_first[None, :], other=0.0)
    query_rest = tl.load(source + rest[None, :], mask=live[:, None] & in_rest[None, :], other=0.0)
    blocks = block_tables + table_row.to(tl.int64) * table_stride
    ones = tl.full([TILE, 16], 1.0, query_first.dtype)

    merged_top = tl.full([R], float("-inf"), tl.float32)
    merged_total = tl.zeros([R], tl.float32)
    merged_sums = tl.zeros([R, V_PAD], tl.float32)
    top = tl.full([R], float("-inf"), tl.float32)
    totals = tl.zeros([R, 16], tl.float32)  # all columns alike
    sums = tl.zeros([R, V_PAD], tl.float32)
    for start in range(begin, stop, TILE):
        position = start + columns
        inside = position < stop
        block = tl.load(blocks + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        cells = ((block * BLOCK_SIZE + position % BLOCK_SIZE) * L)[:, None]
        key_first = tl.load(cache + cells + first[None, :], mask=inside[:, None] & in_first[None, :], other=0.0)
        key_rest = tl.load(cache + cells + rest[None, :], mask=inside[:, None] & in_rest[None, :], other=0.0)
        key_first = decode(key_first, query_first.dtype, FORMAT)
        key_rest = decode(key_rest, query_first.dtype, FORMAT)
        scores = tl.dot(query_first, key_first.T, input_precision=PRECISION)
        scores = tl.dot(query_rest, key_rest.T, scores, input_precision=PRECISION)
        seen = inside[None, :] & (position[None, :] <= last_seen[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * factor)
        base = _base(new_top)
        weights = tl.exp2(scores * factor - base[:, None]).to(query_first.dtype)
        shrink = tl.exp2(top - base)
        totals = tl.dot(weights, ones, totals * shrink[:, None], input_precision=PRECISION)
        sums = tl.dot(weights, key_first, sums * shrink[:, None], input_precision=PRECISION)
        top = new_top
        if FIXED:
            if ((start + TILE) % split_keys == 0) | (start + TILE >= stop):
                total = tl.max(totals, axis=1)
                if PARTIAL:
                    own = (item * max_splits + start // split_keys).to(tl.int64) * NUM_HEADS + head
                    _store_partial(partial_sums, partial_stats, own, live, in_first, top, total, sums, V_PAD)
                else:
                    merged_top, merged_total, merged_sums = _merge(
                        merged_top, merged_total, merged_sums, top, total, sums
                    )
                top = tl.full([R], float("-inf"), tl.float32)
                totals = tl.zeros([R, 16], tl.float32)
                sums = tl.zeros([R, V_PAD], tl.float32)
    if PARTIAL and not FIXED:  # one split a program; what the loop kept in shared memory makes room
        own = (item * max_splits + begin_split).to(tl.int64) * NUM_HEADS + head
        _store_partial(partial_sums, partial_stats, own, live, in_first, top, tl.max(totals, axis=1), sums, V_PAD)
    if not PARTIAL:
        if not FIXED:
            merged_total, merged_sums = tl.max(totals, axis=1), sums
        merged_total = tl.where(live, merged_total, 1.0)
        result = merged_sums / merged_total[:, None]
        if value_scale is not None:
            result *= value_scale
        target = output + ((token * NUM_HEADS + head) * V)[:, None] + first[None, :]
        tl.store(target, result.to(output.dtype.element_ty), mask=live[:, None] & in_first[None, :])


@triton.jit(do_not_specialize=["max_splits"], do_not_specialize_on_alignment=["seq_lens", "tokens"])
def _merge_kernel(
    output, seq_lens, tokens, partial_sums, partial_stats, max_splits, value_scale,
    NUM_HEADS: tl.constexpr, V: tl.constexpr, V_PAD: tl.constexpr, TILE: tl.constexpr, FIXED: tl.constexpr,
    FIXED_KEYS: tl.constexpr, PARTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (sequence, query head): its splits, PARTS at a time; in fixed order one after the other."""
    item, head = tl.program_id(0), tl.program_id(1)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    end = tl.load(seq_lens + item)
    if end == 0:
        return
    num_splits = tl.cdiv(end, _split_keys(end, max_splits, TILE, FIXED, FIXED_KEYS))
    token = item
    if tokens is not None:
        token = tl.load(tokens + item)
    part, first = tl.arange(0, PARTS), tl.arange(0, V_PAD)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([1, V_PAD], tl.float32)
    for start in range(0, num_splits, PARTS):
        inside = start + part < num_splits
        own = (item * max_splits + start + part).to(tl.int64) * NUM_HEADS + head
        part_top = tl.load(partial_stats + own * 2, mask=inside, other=float("-inf"))
        part_total = tl.load(partial_stats + own * 2 + 1, mask=inside, other=0.0)
        place = partial_sums + own[:, None] * V_PAD + first[None, :]
        part_sums = tl.load(place, mask=inside[:, None] & (first < V)[None, :], other=0.0)
        if not FIXED:
            tops = part_top
            part_top = tl.max(tops, axis=0, keep_dims=True)
            weights = tl.exp2(tops - part_top)
            part_total = tl.sum(part_total * weights, axis=0, keep_dims=True)
            part_sums = tl.sum(part_sums * weights[:, None], axis=0, keep_dims=True)
        top, total, sums = _merge(top, total, sums, part_top, part_total, part_sums)
    result = sums / total[:, None]
    if value_scale is not None:
        result *= value_scale
    target = output + (token.to(tl.int64) * NUM_HEADS + head) * V + first[None, :]
    tl.store(target, result.to(output.dtype.element_ty), mask=(first < V)[None, :])


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Of a launch: most rows of a tile, keys of a turn."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def latent_shape(dtype: torch.dtype, device: torch.device, *, fixed: bool) -> Shape:
    """What registers and shared memory hold for rows of 576 numbers. Some GPUs have 99 KiB of the latter."""
    if dtype is torch.float32:
        return Shape(16, 16, 4, 1)
    if not has_large_tiles(device):
        return Shape(16, 32, 4, 2)
    return Shape(16, 32, 4, 3) if fixed else Shape(64, 32, 8, 2)


def _heads_of_tile(num_heads: int, shape: Shape) -> int:
    return min(triton.next_power_of_2(num_heads), shape.rows)


def latent_tile_tokens(num_heads: int, dtype: torch.dtype, device: torch.device, *, fixed: bool) -> int:
    """Tokens of one prompt that `latent_prefill` puts in a tile."""
    shape = latent_shape(dtype, device, fixed=fixed)
    return shape.rows // _heads_of_tile(num_heads, shape)


def latent_scratch_bytes(num_heads: int, latent_dim: int, context: int) -> int:
    """What the splits of `latent_decode` in fixed order leave for each other at most, for sequences of `context`."""
    num_tokens = _ENOUGH_PROGRAMS // 2
    return num_tokens * -(-context // FIXED_SPLIT) * num_heads * (triton.next_power_of_2(latent_dim) + 2) * 4


class LatentWorkspace:
    """What splits leave for each other: owned by a backend, shared by its layers, in place for captured graphs.
    Launches that use it must follow one another in a stream."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        num_processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 4
        self.most_programs = 2 * num_processors
        self._device = device
        self._buffers: dict[int, torch.Tensor] = {}

    def buffer(self, row_size: int, heads: int) -> torch.Tensor:
        """fp32, flat, for rows of partial sums of all programs, each with so many heads: never freed, graphs may point
        to it."""
        size = self.most_programs * heads * row_size
        if size not in self._buffers:
            self._buffers[size] = torch.empty(size, device=self._device)
        return self._buffers[size]


def write_latents(
    latent: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, *, cache_scale: float = 1.0
) -> None:
    """latent [T, L] to slots [T] of a cache [N, block_size, L]."""
    assert latent.stride(1) == 1 and kv_cache.is_contiguous()
    form, latent_dim = cache_format(kv_cache), latent.shape[1]
    _write_kernel[(latent.shape[0],)](
        latent, cache_cells(kv_cache), slot_mapping, latent.stride(0), 1 / cache_scale if form else None,
        L=latent_dim, L_PAD=triton.next_power_of_2(latent_dim), FORMAT=form, num_warps=1,
    )  # fmt: skip


def latent_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    block_tables: torch.Tensor,
    table_rows: torch.Tensor,
    seq_lens: torch.Tensor,
    tokens: torch.Tensor | None,
    workspace: LatentWorkspace | None,
    *,
    scale: float,
    cache_scale: float = 1.0,
) -> None:
    """Attention of one token a row, whose latent is in the cache: fills its row of `output`.

    query [T, Hq, L]; kv_cache [N, block_size, L]; output [T, Hq, V], contiguous; block_tables [rows, B], int32.
    table_rows, seq_lens [S]: int32, several rows may be tokens of one sequence. tokens [S]: int32, which token a row
    is; None: row s is token s. workspace: None: splits are fixed. Launches depend on shapes alone.
    """
    num_rows, num_heads, fixed = seq_lens.shape[0], query.shape[1], workspace is None
    shape = latent_shape(query.dtype, query.device, fixed=fixed)
    head_chunks = -(-num_heads // _heads_of_tile(num_heads, shape))
    context = block_tables.shape[1] * kv_cache.shape[1]
    value_dim = output.shape[2]
    padded = max(16, triton.next_power_of_2(value_dim))
    most_programs = _ENOUGH_PROGRAMS if workspace is None else workspace.most_programs
    max_splits = -(-context // (FIXED_SPLIT if fixed else shape.keys))
    chunks = max(1, min(max_splits, most_programs // (num_rows * head_chunks)))
    if not fixed:
        max_splits = chunks = min(chunks, _MOST_SPLITS)
    sums = stats = None
    if chunks > 1:
        size = num_rows * max_splits * num_heads
        if workspace is None:
            buffer = torch.empty(size * (padded + 2), device=query.device)
        else:
            buffer = workspace.buffer(padded + 2, _heads_of_tile(num_heads, shape))
        sums, stats = buffer[: size * padded], buffer[size * padded :]
    _launch(
        query, kv_cache, output, block_tables, (None, table_rows, seq_lens, tokens), (sums, stats), shape, fixed,
        (num_rows, head_chunks, chunks), max_splits, scale, cache_scale,
    )  # fmt: skip
    if chunks > 1:
        _merge_kernel[(num_rows, num_heads)](
            output, seq_lens, tokens, sums, stats, max_splits, cache_scale if cache_format(kv_cache) else None,
            NUM_HEADS=num_heads, V=value_dim, V_PAD=padded, TILE=shape.keys, FIXED=fixed, FIXED_KEYS=FIXED_SPLIT,
            PARTS=1 if fixed else _PARTS, DEPENDENT=has_dependent_launch(query.device),
            num_warps=1 if fixed else 4, enable_fp_fusion=False,
            **launch_options(query.device),
        )  # fmt: skip


def latent_prefill(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    block_tables: torch.Tensor,
    tiles: torch.Tensor,
    *,
    fixed: bool,
    scale: float,
    cache_scale: float = 1.0,
) -> None:
    """Attention of prompts' new tokens, whose latents are in the cache: fills their rows of `output`.

    tiles: as `attention.sequences.plan_tiles` makes them, for `latent_tile_tokens`. The rest as in `latent_decode`.
    """
    shape = latent_shape(query.dtype, query.device, fixed=fixed)
    head_chunks = -(-query.shape[1] // _heads_of_tile(query.shape[1], shape))
    _launch(
        query, kv_cache, output, block_tables, (tiles, None, None, None), (None, None), shape, fixed,
        (tiles.shape[0], head_chunks, 1), 1, scale, cache_scale,
    )  # fmt: skip


def _launch(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    block_tables: torch.Tensor,
    rows: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    partials: tuple[torch.Tensor | None, torch.Tensor | None],
    shape: Shape,
    fixed: bool,
    grid: tuple[int, int, int],
    max_splits: int,
    scale: float,
    cache_scale: float,
) -> None:
    """rows: tiles, or table_rows, seq_lens and tokens."""
    (num_heads, latent_dim), value_dim = query.shape[1:], output.shape[2]
    assert query.stride(2) == 1 and kv_cache.is_contiguous() and output.is_contiguous() and value_dim < latent_dim
    form, heads = cache_format(kv_cache), _heads_of_tile(num_heads, shape)
    factor, _ = score_factors(scale * cache_scale if form else scale, None)
    num_rows = max(16, heads) if rows[0] is None else max(16, shape.rows)
    _latent_kernel[grid](
        query, cache_cells(kv_cache), output, block_tables, *rows, *partials,
        query.stride(0), query.stride(1), block_tables.stride(0), factor, max_splits, cache_scale if form else None,
        DECODE=rows[0] is None, PARTIAL=partials[0] is not None, NUM_HEADS=num_heads, HEADS=heads, R=num_rows,
        L=latent_dim, V=value_dim, V_PAD=max(16, triton.next_power_of_2(value_dim)),
        REST_PAD=max(16, triton.next_power_of_2(latent_dim - value_dim)), BLOCK_SIZE=kv_cache.shape[1],
        TILE=shape.keys, FIXED=fixed, FIXED_KEYS=FIXED_SPLIT,
        PRECISION="ieee" if query.dtype is torch.float32 else "tf32", FORMAT=form,
        DEPENDENT=has_dependent_launch(query.device), enable_fp_fusion=not fixed,
        num_warps=shape.num_warps, num_stages=shape.num_stages, **launch_options(query.device),
    )  # fmt: skip
