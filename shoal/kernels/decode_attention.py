"""Attention of one new token a sequence over a paged KV cache, in one kernel from the projection on: norm and rotation
of heads, write of the new key and value, attention split over the context, sum of the splits. Used by `triton_paged`.

H100, bfloat16, 32 query heads, 8 KV heads, D 128, in a CUDA graph (2026-11): 256 sequences of 850 tokens 317 us, that
is 2.8 TB/s where a copy moves 2.44; 64 sequences 96 us; 1 sequence of 1000 tokens 7.3, of 4096 14.5, of 131072 212.
(With one split for each group from 64 sequences on; the empty ones that such launches have now were not timed.)
H200: 190 sequences of 300 to 1224 tokens 150 us, the longest first, that is 3.9 TB/s where reading alone reaches 4.34;
157 in random order.

S sequences, T tokens, Hq query heads, Hk KV heads, G = Hq / Hk, D head size, N blocks, B blocks a row of the table.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from shoal.kernels.cache_format import cache_cells, cache_format, decode, encode
from shoal.kernels.heads import places_of_halves, transform_halves
from shoal.kernels.launch import has_dependent_launch, launch_options
from shoal.kernels.scores import LOG2_E, capped, score_factors

# (groups for a processor, splits that pay, tokens of context that are not split): of more groups no split pays.
_SPLITS = ((1 / 8, 16, 256), (1 / 2, 8, 256), (1, 4, 512), (float("inf"), 1, 512))
# Not split in a sequence or two of few query heads: their first tiles are read while the product before still runs.
_WHOLE_ALONE = 128
# Tokens of a split above which there may be more of them.
_LONG_SPLIT = 1024
_MOST_WAVES = 16  # programs a processor, of all splits together


def launch_shape(head_dim: int, dtype: torch.dtype, has_many: bool) -> tuple[int, int, int]:
    """Keys a tile, num_warps, num_stages. What fits into 99 KiB of shared memory, as the smaller GPUs have.

    has_many: more programs than processors. They read while others compute, so that larger tiles are worth more than
    tiles ahead: 157 µs in place of 160 for the 190 sequences above, 179 in place of 186 with 2 query heads a KV head.
    """
    if dtype is torch.float32:
        return (32 if head_dim <= 128 else 16), 4, 3
    if head_dim > 128:
        return 32, 4, 3
    return (128, 4, 2) if has_many else (64, 4, 3)


@triton.jit
def _load_tile(
    keys, values, block, position, end, half, whole,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, TYPE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Both halves of the keys [D / 2, n], values [n, D]; zeros from `end` on: what lies there may be no number."""
    inside = position < end
    cells = block.to(tl.int64) * (BLOCK_SIZE * D) + (position % BLOCK_SIZE) * D
    in_a = inside[None, :] & (half < HALF)[:, None]
    in_b = inside[None, :] & (half < D - HALF)[:, None]
    key_a = tl.load(keys + cells[None, :] + half[:, None], mask=in_a, other=0.0)
    key_b = tl.load(keys + cells[None, :] + (half + HALF)[:, None], mask=in_b, other=0.0)
    in_value = inside[:, None] & (whole < D)[None, :]
    value = tl.load(values + cells[:, None] + whole[None, :], mask=in_value, other=0.0)
    return decode(key_a, TYPE, FORMAT), decode(key_b, TYPE, FORMAT), decode(value, TYPE, FORMAT)


@triton.jit
def _attend_tile(
    query_a, query_b, key_a, key_b, value, position, lowest, end, factor, cap, top, total, sums,
    WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One turn of the online softmax (Milakov and Gimelshein 2018), in powers of two."""
    scores = tl.dot(query_a, key_a, input_precision=PRECISION)
    scores = capped(tl.dot(query_b, key_b, scores, input_precision=PRECISION), factor, cap)
    visible = position < end
    if WINDOWED:
        visible &= position >= lowest
    scores = tl.where(visible[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, axis=1)
    sums = tl.dot(weights.to(value.dtype), value, sums * shrink[:, None], input_precision=PRECISION)
    return new_top, total, sums


@triton.jit
def _add_splits(
    partial_sums, partial_stats, output, first, num_active, value_scale,
    G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, G_TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The splits of a sequence's KV head, whose first partial row is `first`, PARTS at a time; output: its row. They
    are read from where all processors see them, not from this one's own cache."""
    part, row, column = tl.arange(0, PARTS), tl.arange(0, G_TILE), tl.arange(0, D_PAD)
    top = tl.full([G_TILE], float("-inf"), tl.float32)
    total = tl.zeros([G_TILE], tl.float32)
    sums = tl.zeros([G_TILE, D_PAD], tl.float32)
    for start in range(0, num_active, PARTS):
        inside = (start + part < num_active)[:, None] & (row < G)[None, :]
        index = first + (start + part)[:, None] * G + row[None, :]
        tops = tl.load(partial_stats + index * 2, mask=inside, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(partial_stats + index * 2 + 1, mask=inside, other=0.0, cache_modifier=".cg")
        tile = tl.load(
            partial_sums + index[:, :, None] * D_PAD + column[None, None, :],
            mask=inside[:, :, None] & (column < D)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        new_top = tl.where(row < G, tl.maximum(top, tl.max(tops, axis=0)), 0.0)
        weights = tl.exp2(tops - new_top[None, :])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(totals * weights, axis=0)
        sums = sums * shrink[:, None] + tl.sum(tile * weights[:, :, None], axis=0)
        top = new_top
    total = tl.where(row < G, total, 1.0)
    result = sums / total[:, None]
    if value_scale is not None:
        result *= value_scale
    result = result.to(output.dtype.element_ty)
    held = (row < G)[:, None] & (column < D)[None, :]
    tl.store(output + row[:, None] * D + column[None, :], result, mask=held)


@triton.jit(
    do_not_specialize=["splits", "few_splits", "whole_span", "window", "table_stride"],
    # Of a step outside of graphs these are lines of one upload, which lie wherever its number of sequences puts them.
    do_not_specialize_on_alignment=["table_rows", "seq_lens", "tokens"],
)
def _decode_kernel(
    query, key, value, output, keys, values, block_tables, table_rows, seq_lens, tokens,
    positions, table, query_norm, key_norm, eps, partial_sums, partial_stats, counters,
    query_stride, key_stride, value_stride, query_head, key_head, value_head, cache_head, table_stride,
    factor, window, splits, few_splits, whole_span, cap, sinks, key_inverse, value_inverse, value_scale,
    LONG_SPLIT: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, G_TILE: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, WINDOWED: tl.constexpr, ROTATE: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, NORM_Q: tl.constexpr, NORM_K: tl.constexpr,
    PRECISION: tl.constexpr, FORMAT: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (split, KV head, sequence). Each split takes a like share of the sequence's old keys; the last one that
    has any takes the newest key from its own registers. Splits without a share leave at once.

    EARLY: lengths, tables and old keys were there before the kernel in front of this one, so they, and the first tile,
    are read while that one still runs.
    """
    split, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL and not EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    newest = tl.load(seq_lens + sequence) - 1
    if not EARLY:
        if newest < 0:  # no sequence
            return
    table_row = tl.load(table_rows + sequence)
    token = sequence
    if tokens is not None:
        token = tl.load(tokens + sequence)
    lowest = 0
    if WINDOWED:
        lowest = tl.maximum(newest + 1 - window, 0)
    first = (lowest // BLOCK_N) * BLOCK_N
    span = newest - first
    # As many splits as fill the device, more where they would be long, and no second one for a short context: to add
    # splits up takes as long as a few tiles.
    split_len = tl.maximum(tl.minimum(tl.cdiv(span, few_splits), LONG_SPLIT), tl.cdiv(span, splits))
    split_len = tl.maximum(tl.cdiv(split_len, BLOCK_N), 1) * BLOCK_N
    if span <= whole_span:
        split_len = whole_span
    num_active = tl.maximum(tl.cdiv(span, split_len), 1)
    if split >= num_active:
        return
    begin = first + split * split_len
    end = tl.minimum(begin + split_len, newest)
    has_newest = split == num_active - 1
    blocks = block_tables + table_row.to(tl.int64) * table_stride
    keys += kv_head.to(tl.int64) * cache_head
    values += kv_head.to(tl.int64) * cache_head
    rows, half, whole = tl.arange(0, G_PAD), tl.arange(0, HALF_PAD), tl.arange(0, D_PAD)
    TYPE: tl.constexpr = query.dtype.element_ty
    token = token.to(tl.int64)

    # Block ids are read one turn ahead: were they read where they are used, keys and values would wait for them.
    position = begin + tl.arange(0, BLOCK_N)
    block = tl.load(blocks + position // BLOCK_SIZE, mask=position < end, other=0)
    cell = tl.load(blocks + newest // BLOCK_SIZE).to(tl.int64) * (BLOCK_SIZE * D) + (newest % BLOCK_SIZE) * D
    first_place, second_place = places_of_halves(half, D, HALF, ROTARY, INTERLEAVED)
    cos, sin = 1.0, 0.0
    if ROTATE:
        angles = table + tl.load(positions + token).to(tl.int64) * ROTARY + half
        cos = tl.load(angles, mask=half < ROTARY // 2, other=1.0)[None, :]
        sin = tl.load(angles + ROTARY // 2, mask=half < ROTARY // 2, other=0.0)[None, :]
    if EARLY:
        key_a, key_b, tile = _load_tile(
            keys, values, block, position, end, half, whole, D, HALF, BLOCK_SIZE, TYPE, FORMAT
        )
        if PDL:
            tl.extra.cuda.gdc_wait()
            # Not before the wait: that the next attention kernel starts only now is what it may rely on for EARLY.
            tl.extra.cuda.gdc_launch_dependents()

    # The heads of this group, padded to G_PAD rows.
    source = query + token * query_stride + (kv_head * G + rows[:, None]) * query_head
    query_a = tl.load(source + first_place[None, :], mask=(rows < G)[:, None] & (half < HALF)[None, :], other=0.0)
    query_b = tl.load(source + second_place[None, :], mask=(rows < G)[:, None] & (half < D - HALF)[None, :], other=0.0)
    # The newest key and value: written by the split that sees them, and its first summand.
    new_in_a = has_newest & (half < HALF)[None, :]
    new_in_b = has_newest & (half < D - HALF)[None, :]
    new_inside = has_newest & (whole < D)
    source = key + token * key_stride + kv_head * key_head
    new_a = tl.load(source + first_place[None, :], mask=new_in_a, other=0.0)
    new_b = tl.load(source + second_place[None, :], mask=new_in_b, other=0.0)
    new_value = tl.load(value + token * value_stride + kv_head * value_head + whole, mask=new_inside, other=0.0)
    query_a, query_b = transform_halves(
        query_a, query_b, query_norm, half, first_place, second_place, cos, sin, eps, D, HALF, NORM_Q, ROTATE
    )
    new_a, new_b = transform_halves(
        new_a, new_b, key_norm, half, first_place, second_place, cos, sin, eps, D, HALF, NORM_K, ROTATE
    )
    stored_a, stored_b = encode(new_a, key_inverse, FORMAT), encode(new_b, key_inverse, FORMAT)
    stored_value = encode(new_value, value_inverse, FORMAT)
    tl.store(keys + cell + half[None, :], stored_a, mask=new_in_a)
    tl.store(keys + cell + HALF + half[None, :], stored_b, mask=new_in_b)
    tl.store(values + cell + whole, stored_value, mask=new_inside)
    new_a, new_b = decode(stored_a, TYPE, FORMAT), decode(stored_b, TYPE, FORMAT)
    new_value = decode(stored_value, TYPE, FORMAT)
    score = tl.sum(query_a.to(tl.float32) * new_a.to(tl.float32), axis=1)
    score += tl.sum(query_b.to(tl.float32) * new_b.to(tl.float32), axis=1)
    top = tl.where(has_newest, capped(score, factor, cap), float("-inf"))
    total = tl.where(has_newest, tl.full([G_PAD], 1.0, tl.float32), 0.0)
    sums = tl.zeros([G_PAD, D_PAD], tl.float32) + new_value.to(tl.float32)[None, :]
    if sinks is not None:  # as one more key, of a value of zeros
        if has_newest:
            sink = tl.load(sinks + kv_head * G + rows, mask=rows < G, other=0.0).to(tl.float32) * LOG2_E
            with_sink = tl.maximum(top, sink)
            total = tl.exp2(top - with_sink)
            sums = sums * total[:, None]
            total += tl.exp2(sink - with_sink)
            top = with_sink

    if EARLY:
        if begin < end:
            top, total, sums = _attend_tile(
                query_a, query_b, key_a, key_b, tile, position, lowest, end, factor, cap, top, total, sums,
                WINDOWED, PRECISION,
            )  # fmt: skip
        begin += BLOCK_N
        position += BLOCK_N
        block = tl.load(blocks + position // BLOCK_SIZE, mask=position < end, other=0)
    for start in range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        key_a, key_b, tile = _load_tile(
            keys, values, block, position, end, half, whole, D, HALF, BLOCK_SIZE, TYPE, FORMAT
        )
        ahead = position + BLOCK_N
        block = tl.load(blocks + ahead // BLOCK_SIZE, mask=ahead < end, other=0)
        top, total, sums = _attend_tile(
            query_a, query_b, key_a, key_b, tile, position, lowest, end, factor, cap, top, total, sums,
            WINDOWED, PRECISION,
        )  # fmt: skip

    target = output + token * (NUM_KV_HEADS * G * D) + kv_head * (G * D)
    held = (rows < G)[:, None] & (whole < D)[None, :]
    if num_active == 1:
        result = sums / total[:, None]
        if value_scale is not None:
            result *= value_scale
        result = result.to(output.dtype.element_ty)
        tl.store(target + rows[:, None] * D + whole[None, :], result, mask=held)
    else:
        group = sequence * NUM_KV_HEADS + kv_head
        own = (group * splits + split) * G + rows
        tl.store(partial_sums + own[:, None] * D_PAD + whole[None, :], sums, mask=held)
        tl.store(partial_stats + own * 2, top, mask=rows < G)
        tl.store(partial_stats + own * 2 + 1, total, mask=rows < G)
        tl.debug_barrier()
        if tl.atomic_add(counters + group, 1, sem="acq_rel") == num_active - 1:
            # All splits are in: this program, the last one, adds them up and leaves the counter as it was.
            tl.store(counters + group, 0)
            _add_splits(
                partial_sums, partial_stats, target, group * splits * G, num_active, value_scale,
                G, D, D_PAD, G_TILE, PARTS,
            )  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeRows:
    """The sequences of a launch. block_tables [rows, B]: int32. table_rows, seq_lens [S]: int32, the row of the table
    and the length with the new token counted in, 0 where there is no sequence. tokens [S]: int32, index among the T
    tokens; None: sequence s has token s."""

    block_tables: torch.Tensor
    table_rows: torch.Tensor
    seq_lens: torch.Tensor
    tokens: torch.Tensor | None = None


class DecodeWorkspace:
    """What splits leave for each other: owned by a backend, shared by its layers, in place for captured graphs.
    Launches that use it must follow one another in a stream."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.num_processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 4
        self.counters = torch.zeros(_MOST_WAVES * self.num_processors, dtype=torch.int32, device=device)
        self._buffers: dict[int, torch.Tensor] = {}

    def num_splits(self, num_groups: int, most: int, parts: int) -> tuple[int, int, int]:
        """Of a launch for `num_groups` (sequence, KV head): splits of each, at most `most`; how many of them pay where
        contexts are not very long; up to which context none does. parts: splits that are added up at once.

        To add splits up takes as long as to read some 256 tokens. Measured for 2 to 128 groups of 2 to 8 query heads
        with contexts of 130 to 4000 tokens (H100, 2026-11). More splits than pay keep a few very long sequences from
        running long after all others."""
        few, whole = next(each[1:] for each in _SPLITS if num_groups <= each[0] * self.num_processors)
        if few == 16 <= parts:
            whole = _WHOLE_ALONE
        few = min(few, max(parts, 4))
        enough = max(2 * self.num_processors // num_groups, min(8, _MOST_WAVES * self.num_processors // num_groups), 1)
        return min(max(enough, few), most), min(few, most), whole

    def buffers(self, row_size: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums [programs * G, row_size] and statistics [programs * G, 2] of splits, fp32, flat: never freed, graphs may
        point to them."""
        num_rows = group * _MOST_WAVES * self.num_processors
        size = num_rows * (row_size + 2)
        if size not in self._buffers:
            self._buffers[size] = torch.empty(size, device=self.counters.device)
        buffer = self._buffers[size]
        return buffer[: num_rows * row_size], buffer[num_rows * row_size :]


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    rows: DecodeRows,
    workspace: DecodeWorkspace,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    positions: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    interleaved: bool = False,
    early: bool = False,
) -> None:
    """Write the new keys and values of these sequences to the cache and attend: fills their rows of `output`.

    query [T, Hq, D]; key, value [T, Hk, D]: any strides but the last; output [T, Hq * D], contiguous.
    kv_cache [2, Hk, N, block_size, D]. softcap, sinks [Hq], key_scale, value_scale: as in `AttentionForm`.
    positions [T], table [P, R], interleaved: rotation, as in `transform_and_write`; None: heads are taken as they are.
    early: rows, positions and earlier tokens' keys were written before the last kernel in the stream, see
    `_decode_kernel`. The number of programs depends on shapes alone: a CUDA graph can hold the launch.
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = key.shape[1], kv_cache.shape[3]
    group = num_heads // num_kv_heads
    num_sequences = rows.seq_lens.shape[0]
    num_groups = num_sequences * num_kv_heads
    has_many = num_groups > workspace.num_processors
    block_n, num_warps, num_stages = launch_shape(head_dim, query.dtype, has_many)
    context = rows.block_tables.shape[1] * block_size
    if sliding_window is not None:
        context = min(context, sliding_window + block_n)
    half = (head_dim + 1) // 2
    padded = max(16, triton.next_power_of_2(head_dim))
    # Where there are programs enough, they hide each other's waits, and registers are worth more.
    early = early and not has_many
    sums, stats = workspace.buffers(padded, group)
    group_tile = triton.next_power_of_2(group)
    parts = max(1, min(16, 8192 // (group_tile * padded)))
    splits, few_splits, whole_span = workspace.num_splits(num_groups, -(-context // block_n), parts)
    cache, form = cache_cells(kv_cache), cache_format(kv_cache)
    factor, cap = score_factors(scale * key_scale if form else scale, softcap)
    scales = (1 / key_scale, 1 / value_scale, value_scale) if form else (None, None, None)
    _decode_kernel[(splits, num_kv_heads, num_sequences)](
        query, key, value, output, cache[0], cache[1], rows.block_tables, rows.table_rows, rows.seq_lens,
        rows.tokens, positions, table, query_norm, key_norm, eps, sums, stats, workspace.counters,
        query.stride(0), key.stride(0), value.stride(0), query.stride(1), key.stride(1), value.stride(1),
        kv_cache.stride(1), rows.block_tables.stride(0), factor, sliding_window or 0, splits, few_splits,
        whole_span, cap, sinks, *scales,
        LONG_SPLIT=_LONG_SPLIT, NUM_KV_HEADS=num_kv_heads, G=group,
        G_PAD=max(16, group_tile), G_TILE=group_tile,
        PARTS=parts,
        D=head_dim, D_PAD=padded, HALF=half, HALF_PAD=max(16, triton.next_power_of_2(half)),
        BLOCK_SIZE=block_size, BLOCK_N=block_n, WINDOWED=sliding_window is not None, ROTATE=table is not None,
        ROTARY=head_dim if table is None else table.shape[1], INTERLEAVED=interleaved,
        NORM_Q=query_norm is not None, NORM_K=key_norm is not None,
        PRECISION="ieee" if query.dtype is torch.float32 else "tf32", PDL=has_dependent_launch(query.device),
        EARLY=early, FORMAT=form,
        num_warps=num_warps, num_stages=num_stages, **launch_options(query.device),
    )  # fmt: skip
