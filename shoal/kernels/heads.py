"""Query and key heads between projection and attention: RMSNorm, rotation, write to the KV cache. Used by the paged
attention backend for steps with prompts, and by the decode kernel for its own heads.

T tokens, Hq query heads, Hk KV heads, D head size, P positions, R numbers of a head that turn. Heads are worked on as
two halves of D / 2 each: pairs that turn have one number in each, and so do those that stay. Transformed heads, keys in
the cache too, are stored in this order, whatever theirs was before: products of queries and keys are the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from shoal.kernels.cache_format import cache_cells, cache_format, encode

_BLOCK_T = 8  # tokens a program
_HEADS = 8  # heads a program


@triton.jit
def normalise_halves(a, b, weight_a, weight_b, eps, D: tl.constexpr):
    """RMSNorm of rows [..., D] given as halves in fp32, zero where padded; not yet rounded."""
    mean = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D
    factor = tl.rsqrt(mean + eps)[:, None]
    return a * factor * weight_a, b * factor * weight_b


@triton.jit
def rotate_halves(a, b, cos, sin):
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def places_of_halves(half, D: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where the numbers of the two halves stand in a head as it was projected. half: indices of a half."""
    first, second = half, half + HALF
    if INTERLEAVED:
        first, second = half * 2, half * 2 + 1
    elif ROTARY < D:
        turns = half < ROTARY // 2
        first, second = tl.where(turns, half, half + ROTARY // 2), half + tl.where(turns, ROTARY // 2, HALF)
    return first, second


@triton.jit
def transform_halves(
    a, b, weight, half, first, second, cos, sin, eps,
    D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Halves [rows, D / 2] as loaded -> normalised and rotated ones, rounded to their type after each of the two, as
    the plain layers do. half: indices of a half, padded to a power of two; first, second: `places_of_halves`."""
    if NORM:
        weight_a = tl.load(weight + first, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
        weight_b = tl.load(weight + second, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
        wide_a, wide_b = normalise_halves(a.to(tl.float32), b.to(tl.float32), weight_a, weight_b, eps, D)
        a, b = wide_a.to(a.dtype), wide_b.to(b.dtype)
    if ROTATE:
        wide_a, wide_b = rotate_halves(a.to(tl.float32), b.to(tl.float32), cos, sin)
        a, b = wide_a.to(a.dtype), wide_b.to(b.dtype)
    return a, b


@triton.jit(do_not_specialize=["num_tokens"])
def _heads_kernel(
    query, key, value, positions, slots, table, query_norm, key_norm, query_out, key_out, keys, values, num_tokens,
    query_stride, key_stride, value_stride, query_head, key_head, value_head, cache_head, eps,
    key_inverse, value_inverse, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr, HEADS: tl.constexpr, QUERY_CHUNKS: tl.constexpr,
    ROTATE: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, NORM_Q: tl.constexpr, NORM_K: tl.constexpr,
    KEEP_KEYS: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Program (t, c): BLOCK_T tokens, HEADS query heads (c < QUERY_CHUNKS) or KV heads."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    chunk = tl.program_id(1)
    live = rows < num_tokens
    half = tl.arange(0, HALF_PAD)
    in_a = live[:, None] & (half < HALF)[None, :]
    in_b = live[:, None] & (half < D - HALF)[None, :]
    wide_rows = rows.to(tl.int64)[:, None]
    first, second = places_of_halves(half, D, HALF, ROTARY, INTERLEAVED)
    cos, sin = 1.0, 0.0
    if ROTATE:
        position = tl.load(positions + rows, mask=live, other=0).to(tl.int64)[:, None]
        turns = live[:, None] & (half < ROTARY // 2)[None, :]
        cos = tl.load(table + position * ROTARY + half[None, :], mask=turns, other=1.0)
        sin = tl.load(table + position * ROTARY + ROTARY // 2 + half[None, :], mask=turns, other=0.0)
    if chunk < QUERY_CHUNKS:
        for step in range(HEADS):
            head = chunk * HEADS + step
            if head < NUM_HEADS:
                source = query + wide_rows * query_stride + head * query_head
                a = tl.load(source + first[None, :], mask=in_a, other=0.0)
                b = tl.load(source + second[None, :], mask=in_b, other=0.0)
                a, b = transform_halves(a, b, query_norm, half, first, second, cos, sin, eps, D, HALF, NORM_Q, ROTATE)
                target = query_out + (wide_rows * NUM_HEADS + head) * D + half[None, :]
                tl.store(target, a, mask=in_a)
                tl.store(target + HALF, b, mask=in_b)
    else:
        slot = tl.load(slots + rows, mask=live, other=0).to(tl.int64)[:, None]
        for step in range(HEADS):
            head = (chunk - QUERY_CHUNKS) * HEADS + step
            if head < NUM_KV_HEADS:
                source = key + wide_rows * key_stride + head * key_head
                a = tl.load(source + first[None, :], mask=in_a, other=0.0)
                b = tl.load(source + second[None, :], mask=in_b, other=0.0)
                source = value + wide_rows * value_stride + head * value_head + half[None, :]
                value_a = tl.load(source, mask=in_a, other=0.0)
                value_b = tl.load(source + HALF, mask=in_b, other=0.0)
                a, b = transform_halves(a, b, key_norm, half, first, second, cos, sin, eps, D, HALF, NORM_K, ROTATE)
                cell = head.to(tl.int64) * cache_head + slot * D + half[None, :]
                tl.store(keys + cell, encode(a, key_inverse, FORMAT), mask=in_a)
                tl.store(keys + cell + HALF, encode(b, key_inverse, FORMAT), mask=in_b)
                tl.store(values + cell, encode(value_a, value_inverse, FORMAT), mask=in_a)
                tl.store(values + cell + HALF, encode(value_b, value_inverse, FORMAT), mask=in_b)
                if KEEP_KEYS:
                    target = key_out + (wide_rows * NUM_KV_HEADS + head) * D + half[None, :]
                    tl.store(target, a, mask=in_a)
                    tl.store(target + HALF, b, mask=in_b)


def transform_and_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    interleaved: bool = False,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    keep_keys: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the keys and values of a step to their slots; with a `table`, transform query and key heads before.

    query [T, Hq, D]; key, value [T, Hk, D]: any strides but the last. kv_cache [2, Hk, N, block_size, D].
    positions [T], table [P, R]: cosines and sines, fp32; None: heads are taken as they are. interleaved: as in
    `HeadTransform`; key_scale, value_scale: as in `AttentionForm`. Returns the transformed queries [T, Hq, D],
    contiguous, and keys likewise with `keep_keys`; what is not transformed is returned as given.
    It moves what it must at the speed of a copy (8192 tokens of 32 + 8 heads of 128: 86 us, H100, 2026-11).
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    rotate = table is not None
    query_out = torch.empty_like(query, memory_format=torch.contiguous_format) if rotate else query
    keep_keys = keep_keys and rotate
    key_out = torch.empty_like(key, memory_format=torch.contiguous_format) if keep_keys else key
    query_chunks = -(-num_heads // _HEADS) if rotate else 0
    half = (head_dim + 1) // 2
    cache, form = cache_cells(kv_cache), cache_format(kv_cache)
    grid = (-(-num_tokens // _BLOCK_T), query_chunks + -(-num_kv_heads // _HEADS))
    _heads_kernel[grid](
        query, key, value, positions, slot_mapping, table, query_norm, key_norm, query_out, key_out,
        cache[0], cache[1], num_tokens,
        query.stride(0), key.stride(0), value.stride(0), query.stride(1), key.stride(1), value.stride(1),
        kv_cache.stride(1), eps, 1 / key_scale if form else None, 1 / value_scale if form else None,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, D=head_dim, HALF=half, HALF_PAD=triton.next_power_of_2(half),
        BLOCK_T=_BLOCK_T, HEADS=_HEADS, QUERY_CHUNKS=query_chunks, ROTATE=rotate,
        ROTARY=head_dim if table is None else table.shape[1], INTERLEAVED=interleaved,
        NORM_Q=query_norm is not None, NORM_K=key_norm is not None, KEEP_KEYS=keep_keys, FORMAT=form, num_warps=4,
    )  # fmt: skip
    return query_out, key_out
