"""One token a row, greedy or drawn from the whole vocabulary, in one pass over the logits. Called by shoal.sampling.

R rows, W width of this rank's slice of the vocabulary, C chunks of a row. A program scans one chunk; the last one of a
row to finish puts the row together.

A draw is the race of `sampling/draws.py` with the same noise bits, run in logarithms: the greatest
log2(weight) − log2(noise) wins, where that path takes the least noise / weight. No weight is relative to a best token
here, so that neither chunks nor ranks need to know of each other, and a row's token depends on neither. In exchange the
two scores are rounded as numbers of the size of a logit are: another token wins than there where two scores lie within
some 1e-5 of each other, about one draw in 100,000.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, libdevice

from shoal.kernels.launch import has_dependent_launch, launch_options


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Of a program: the columns of a tile and of all its tiles. What is chosen does not depend on it."""

    tile: int
    chunk: int
    num_warps: int
    # More would leave room for fewer programs.
    max_registers: int | None = None


_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
# The constants of `sampling/random.py`.
_LOWBIAS_1 = tl.constexpr(0x7FEB352D)
_LOWBIAS_2 = tl.constexpr(0x846CA68B)
_LOWBIAS_2_SIGNED = tl.constexpr(0x846CA68B - 2**32)
_UNIFORM_SCALE = tl.constexpr((1 - 2**-24) * 2**-31)
# log2(-log(1 - u) / u) / u for u below _SMALL, within 1e-7: a polynomial through Chebyshev nodes.
_SMALL = tl.constexpr(0.25)
_C0 = tl.constexpr(0.721347791874132)
_C1 = tl.constexpr(0.30050849659444584)
_C2 = tl.constexpr(0.1819715372104435)
_C3 = tl.constexpr(0.10848562975454415)
_C4 = tl.constexpr(0.1652137798117544)
# Of a bound, for what rounding may have taken from it.
_SLACK = tl.constexpr(1e-3)
_NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def _hashed(token_ids):
    """`random.token_hashes` of these ids."""
    hashed = token_ids.to(tl.uint32)
    hashed = (hashed ^ (hashed >> 16)) * _LOWBIAS_1
    hashed = (hashed ^ (hashed >> 15)) * _LOWBIAS_2
    return (hashed ^ (hashed >> 16)).to(tl.int32, bitcast=True)


@triton.jit
def _noise_bits(hashed_ids, key):
    """`random.noise_bits`, made odd: int32, uniform over [0, 2**31)."""
    bits = hashed_ids ^ key
    bits = bits * _LOWBIAS_1
    bits = (bits ^ (bits >> 15)) * _LOWBIAS_2_SIGNED
    return (bits ^ (bits >> 16)) | 1


@triton.jit
def _log2(values, FAST: tl.constexpr):
    return libdevice.fast_log2f(values) if FAST else tl.log2(values)


@triton.jit
def _log2_noise(bits, FAST: tl.constexpr):
    """log2 of the exponential variable -log(1 - u) that the bits stand for, to the precision of u itself."""
    u = bits.to(tl.float32) * _UNIFORM_SCALE
    small = u < _SMALL
    series = u * (_C0 + u * (_C1 + u * (_C2 + u * (_C3 + u * _C4))))
    return _log2(tl.where(small, u, -_LN_2 * _log2(1.0 - u, FAST)), FAST) + tl.where(small, series, 0.0)


@triton.jit
def _load(rows, columns, start, end, TILE: tl.constexpr):
    """fp32, -inf from column `end` on. Without a mask where there is nothing to mask: such loads are wide."""
    if start + TILE <= end:
        values = tl.load(rows + columns)
    else:
        values = tl.load(rows + columns, mask=columns < end, other=float("-inf"))
    return values.to(tl.float32)


@triton.jit
def _greatest_of(row, begin, end, TILE: tl.constexpr):
    """The greatest value in columns begin to end, and its column, the lowest of equal values. NaN is the greatest."""
    best = float("-inf")
    best_column = begin
    found_nan = 0
    for start in range(begin, end, TILE):
        columns = start + tl.arange(0, TILE)
        values = _load(row, columns, start, end, TILE)
        is_nan = values != values
        ordered = tl.where(is_nan, float("inf"), values)
        top = tl.max(ordered)
        # After +inf NaN may come; after NaN nothing.
        if (top > best) | ((top == float("inf")) & (found_nan == 0)):
            nan_here = tl.max(is_nan.to(tl.int32))
            hit = tl.where(nan_here > 0, is_nan, ordered == top)
            column = tl.min(tl.where(hit, columns, _NO_COLUMN))
            if (top > best) | (nan_here > found_nan):
                best = top
                best_column = column
                found_nan = nan_here
    return tl.where(found_nan > 0, float("nan"), best), best_column


@triton.jit
def _greatest_number(row, begin, end, TILE: tl.constexpr):
    greatest = float("-inf")
    for start in range(begin, end, TILE):
        greatest = tl.maximum(greatest, tl.max(_load(row, start + tl.arange(0, TILE), start, end, TILE)))
    return greatest


@triton.jit
def _race(row, scale, key, first_id, start, end, greatest, min_p, TILE: tl.constexpr, FAST: tl.constexpr):
    """The greatest score of a tile, and its column. Tokens whose weight relative to the scaled logit `greatest` is
    below min_p do not run (min_p 0: all do); where nothing runs the score is -inf."""
    columns = start + tl.arange(0, TILE)
    values = _load(row, columns, start, end, TILE)
    score = tl.fma(values, scale, -_log2_noise(_noise_bits(_hashed(columns + first_id), key), FAST))
    if min_p > 0:
        score = tl.where(tl.exp2(values * scale - greatest) >= min_p, score, float("-inf"))
    # A broken model's NaN do not run.
    score = tl.where(score == score, score, float("-inf"))
    top = tl.max(score)
    return top, tl.min(tl.where(score == top, columns, _NO_COLUMN))


@triton.jit
def _race_by_tiles(
    row, scale, key, first_id, begin, end, greatest, min_p, hint, TILE: tl.constexpr, CUTS: tl.constexpr,
    FAST: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """As `_race`, of columns begin to end: tiles that a bound rules out are not looked at closely. CUTS: min_p > 0.

    hint: where the programs of a row leave the best score so far for each other; an old one costs work, not exactness.
    """
    best = float("-inf")
    best_column = begin
    lowest = greatest
    if CUTS:
        lowest = greatest + _log2(min_p, FAST) - _SLACK
    for start in range(begin, end, TILE):
        # It changes meanwhile, and each thread reads it by itself: all must take the same way, so they agree on one.
        others = tl.max(tl.load(hint + tl.zeros([THREADS], tl.int32), volatile=True))
        columns = start + tl.arange(0, TILE)
        values = _load(row, columns, start, end, TILE)
        bits = _noise_bits(_hashed(columns + first_id), key)
        # The noise -log(1 - u) is never below u, which is bits / 2**31.
        bound = tl.fma(values, scale, -_log2(bits.to(tl.float32), FAST))
        if CUTS:
            bound = tl.where(values * scale >= lowest, bound, float("-inf"))
        if tl.max(bound) + (31.0 + _SLACK) > tl.maximum(best, others):
            found, column = _race(row, scale, key, first_id, start, end, greatest, min_p, TILE, FAST)
            if found > best:
                best = found
                best_column = column
                if not CUTS:  # what min_p may yet cut off says nothing to others
                    tl.atomic_max(hint, best, sem="relaxed")
    return best, best_column


@triton.jit
def _best_of(scores, columns):
    """The greatest of the scores [C] and its column: the lowest one of equal scores. NaN is the greatest."""
    is_nan = scores != scores
    found_nan = tl.max(is_nan.to(tl.int32)) > 0
    ordered = tl.where(is_nan, float("inf"), scores)
    top = tl.max(ordered)
    hit = tl.where(found_nan, is_nan, ordered == top)
    return tl.where(found_nan, float("nan"), top), tl.min(tl.where(hit, columns, _NO_COLUMN))


@triton.jit
def _row_number(row_numbers, index, has_row_numbers):
    """int64: the row that is number `index` of those listed, or of all."""
    listed = tl.load(row_numbers + index, mask=has_row_numbers > 0, other=0)
    return tl.where(has_row_numbers > 0, listed, index.to(tl.int64))


@triton.jit(
    do_not_specialize=["first_id", "num_chunks", "num_rows", "has_row_numbers", "has_best"],
    do_not_specialize_on_alignment=[
        "temperatures", "min_ps", "row_keys", "row_numbers", "best_logits", "partial", "values", "token_ids"
    ],
)  # fmt: skip
def _choose_kernel(
    logits, temperatures, min_ps, row_keys, row_numbers, best_logits, partial, counters, hints, values, token_ids,
    logits_stride, parameter_stride, first_id, num_tokens, num_chunks, num_rows, has_row_numbers, has_best,
    CHUNK: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr, DEPENDENT: tl.constexpr, FAST: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """Program (c, r): chunk c of row r. partial: scores, columns, greatest scaled logits, each [R, C].

    Whether there are row_numbers and best_logits is no constant: each would double what must be compiled at the start.
    """
    chunk = tl.program_id(0)
    index = tl.program_id(1)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    number = _row_number(row_numbers, index, has_row_numbers)
    row = logits + number * logits_stride
    temperature = tl.load(temperatures + index * parameter_stride)
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, num_tokens)
    scores = partial + index * num_chunks
    columns = (scores + num_rows * num_chunks).to(tl.pointer_type(tl.int32), bitcast=True)
    maxima = scores + 2 * num_rows * num_chunks
    if temperature > 0:
        scale = _LOG2_E / temperature
        min_p = tl.load(min_ps + index * parameter_stride)
        key = tl.load(row_keys + index * parameter_stride)
        greatest = float("-inf")
        if min_p > 0:
            if has_best > 0:
                greatest = tl.load(best_logits + index) * scale
            else:
                greatest = _greatest_number(row, begin, end, TILE) * scale
            tl.store(maxima + chunk, greatest)
        if CHUNK == TILE:
            best, column = _race(row, scale, key, first_id, begin, end, greatest, min_p, TILE, FAST)
        elif min_p > 0:
            best, column = _race_by_tiles(
                row, scale, key, first_id, begin, end, greatest, min_p, hints + index, TILE, True, FAST, THREADS
            )
        else:
            best, column = _race_by_tiles(
                row, scale, key, first_id, begin, end, greatest, min_p, hints + index, TILE, False, FAST, THREADS
            )
    else:
        best, column = _greatest_of(row, begin, end, TILE)
    tl.store(scores + chunk, best)
    tl.store(columns + chunk, column)
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + index, 1, sem="acq_rel")
    if arrived == num_chunks - 1:
        tl.store(counters + index, 0)
        tl.store(hints + index, float("-inf"))
        _finish(
            logits, temperatures, min_ps, row_keys, row_numbers, scores, columns, maxima, values, token_ids, index,
            logits_stride, parameter_stride, first_id, num_tokens, num_chunks, has_row_numbers, has_best,
            CHUNK, TILE, CHUNKS, FAST,
        )  # fmt: skip


@triton.jit
def _finish(
    logits, temperatures, min_ps, row_keys, row_numbers, scores, columns, maxima, values, token_ids, index,
    logits_stride, parameter_stride, first_id, num_tokens, num_chunks, has_row_numbers, has_best,
    CHUNK: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Put a row together from its chunks."""
    number = _row_number(row_numbers, index, has_row_numbers)
    chunks = tl.arange(0, CHUNKS)
    inside = chunks < num_chunks
    of_winners = tl.load(scores + chunks, mask=inside, other=float("-inf"), cache_modifier=".cg")
    winners = tl.load(columns + chunks, mask=inside, other=_NO_COLUMN, cache_modifier=".cg")
    score, column = _best_of(of_winners, winners)
    temperature = tl.load(temperatures + index * parameter_stride)
    min_p = tl.load(min_ps + index * parameter_stride)
    if (temperature > 0) & (min_p > 0) & (has_best == 0):
        # A chunk cut off what is far below its own best token. Relative to the row's, its winner may go as well.
        key = tl.load(row_keys + index * parameter_stride)
        row = logits + number * logits_stride
        scale = _LOG2_E / temperature
        bests = tl.load(maxima + chunks, mask=inside, other=float("-inf"), cache_modifier=".cg")
        greatest = tl.max(bests)
        logits_of_winners = tl.load(row + winners, mask=inside, other=float("-inf")).to(tl.float32)
        stays = tl.exp2(logits_of_winners * scale - greatest) >= min_p
        kept, kept_column = _best_of(tl.where(stays, of_winners, float("-inf")), tl.where(stays, winners, _NO_COLUMN))
        # Chunks whose winner goes, but not their best token: who else is there?
        again = (tl.exp2(bests - greatest) >= min_p) & (stays == 0) & inside
        hopes = tl.where(again, of_winners, float("-inf"))
        if tl.max(hopes) >= kept:
            for chunk in range(0, num_chunks):
                hope = tl.max(tl.where(chunks == chunk, hopes, float("-inf")))
                if (hope >= kept) & (hope > float("-inf")):
                    end = tl.minimum(chunk * CHUNK + CHUNK, num_tokens)
                    for start in range(chunk * CHUNK, end, TILE):
                        found, where = _race(row, scale, key, first_id, start, end, greatest, min_p, TILE, FAST)
                        if (found > kept) | ((found == kept) & (where < kept_column)):
                            kept = found
                            kept_column = where
        # Nothing is left of a row without a finite logit: any token will do.
        if kept > float("-inf"):
            score = kept
            column = kept_column
    tl.store(values + number, score)
    # Whatever a broken model's numbers do, the next step looks this id up.
    column = tl.maximum(tl.minimum(column, num_tokens - 1), 0)
    tl.store(token_ids + number, (first_id + column).to(tl.int64))


@functools.cache
def _shared(device: torch.device, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How many programs of a row are done, and the best score of a row so far, which spares other programs work.
    Between launches 0 and -inf: the last program sees to it. Kept for good, since graphs know the addresses."""
    counters = torch.zeros(num_rows, dtype=torch.int32, device=device)
    return counters, torch.full((num_rows,), float("-inf"), dtype=torch.float32, device=device)


def choose_tokens(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    min_ps: torch.Tensor,
    row_keys: torch.Tensor,
    first_id: int,
    num_tokens: int,
    *,
    best_logits: torch.Tensor | None = None,
    row_numbers: torch.Tensor | None = None,
    outputs: tuple[torch.Tensor, torch.Tensor] | None = None,
    shape: Shape | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values fp32 [R], token ids int64 [R]): the token of each row, and what it is worth beside other ranks' tokens:
    the greatest value of all ranks wins, of equal ones the lowest id.

    logits [R, W] of fp32, bf16 or fp16 (the last stride 1); token first_id + i is in column i, and columns from
    num_tokens on do not count. temperatures fp32 [R], 0 for greedy rows; min_ps fp32 [R]; row_keys int32 [R]: any
    stride, but all the same. best_logits fp32 [R]: the greatest logit of each row on all ranks, needed for min_p where
    there are several.

    row_numbers int64 [G]: only these rows of logits; parameters and best_logits are then [G], and the rows' lines of
    `outputs`, which is (values, token ids) [R], are filled. Nothing waits for the device, nothing depends on a value on
    the host: it can be captured, after one call with as many rows. Launches on one device must not overlap.
    """
    device = logits.device
    num_rows = temperatures.shape[0]
    assert logits.stride(1) == 1 and temperatures.stride() == min_ps.stride() == row_keys.stride()
    if outputs is None:
        assert row_numbers is None and num_rows == logits.shape[0]
        outputs = (
            torch.empty(num_rows, dtype=torch.float32, device=device),
            torch.zeros(num_rows, dtype=torch.int64, device=device),
        )
    if num_rows == 0:
        return outputs
    shape = shape or _shape(num_rows)
    num_chunks = max(1, triton.cdiv(num_tokens, shape.chunk))
    partial = torch.empty((3, num_rows, num_chunks), dtype=torch.float32, device=device)
    counters, hints = _shared(device, triton.next_power_of_2(max(num_rows, 256)))
    _choose_kernel[(num_chunks, num_rows)](
        logits, temperatures, min_ps, row_keys, outputs[1] if row_numbers is None else row_numbers,
        hints if best_logits is None else best_logits, partial, counters, hints, outputs[0], outputs[1],
        logits.stride(0), temperatures.stride(0), first_id, num_tokens, num_chunks, num_rows,
        int(row_numbers is not None), int(best_logits is not None),
        CHUNK=shape.chunk, TILE=shape.tile, CHUNKS=triton.next_power_of_2(num_chunks),
        DEPENDENT=has_dependent_launch(device), FAST=device.type == "cuda", THREADS=32 * shape.num_warps,
        num_warps=shape.num_warps, maxnreg=shape.max_registers, **launch_options(device),
    )  # fmt: skip
    return outputs


def _shape(num_rows: int) -> Shape:
    """The best of those tried for 151,936 bf16 columns (H100, 2026-11)."""
    if num_rows < 3:
        return Shape(tile=1024, chunk=1024, num_warps=4)
    if num_rows < 8:
        return Shape(tile=2048, chunk=2048, num_warps=4)
    if num_rows < 32:
        return Shape(tile=2048, chunk=4096, num_warps=4)
    return Shape(tile=1024, chunk=4096 if num_rows < 128 else 16384, num_warps=1, max_registers=160)
