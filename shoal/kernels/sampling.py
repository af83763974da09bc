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
    """Of a program: its rows, the columns of a tile and of all its tiles. What is chosen does not depend on it."""

    rows: int
    tile: int
    chunk: int
    num_warps: int
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
    """-inf from column `end` on. Without a mask where there is nothing to mask: such loads are wide."""
    if start + TILE <= end:
        values = tl.load(rows + columns)
    else:
        values = tl.load(rows + columns, mask=columns < end, other=float("-inf"))
    return values


@triton.jit
def _find(row, start, end, TILE: tl.constexpr):
    """Of one tile of a row: the greatest value and its column, the lowest one of equal values. NaN is the greatest."""
    columns = start + tl.arange(0, TILE)
    values = _load(row, columns, start, end, TILE).to(tl.float32)
    is_nan = values != values
    found_nan = tl.max(is_nan.to(tl.int32)) > 0
    ordered = tl.where(is_nan, float("inf"), values)
    top = tl.max(ordered)
    hit = tl.where(found_nan, is_nan, ordered == top)
    return tl.where(found_nan, float("nan"), top), tl.min(tl.where(hit, columns, _NO_COLUMN))


@triton.jit
def _race(
    row, scale, key, first_id, start, end, greatest, min_p, TILE: tl.constexpr, CUTS: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Of one tile of one row: the greatest score and its column. CUTS: tokens whose weight relative to the scaled logit
    `greatest` is below min_p do not run (0: all do). Where nothing runs the score is -inf."""
    columns = start + tl.arange(0, TILE)
    values = _load(row, columns, start, end, TILE).to(tl.float32)
    score = tl.fma(values, scale, -_log2_noise(_noise_bits(_hashed(columns + first_id), key), FAST))
    if CUTS:
        score = tl.where(tl.exp2(values * scale - greatest) >= min_p, score, float("-inf"))
    # A broken model's NaN do not run.
    score = tl.where(score == score, score, float("-inf"))
    top = tl.max(score)
    return top, tl.min(tl.where(score == top, columns, _NO_COLUMN))


@triton.jit
def _row(logits, row_numbers, index, logits_stride, HAS_ROW_NUMBERS: tl.constexpr):
    number = tl.load(row_numbers + index).to(tl.int64) if HAS_ROW_NUMBERS else index.to(tl.int64)
    return logits + number * logits_stride


@triton.jit
def _scale(temperature):
    """What a logit is multiplied by: the logarithm of a weight is to the base 2."""
    return _LOG2_E / tl.where(temperature > 0, temperature, 1.0)


@triton.jit
def _next(
    tile, r, first, last, start, end, logits, row_numbers, logits_stride,
    ROWS: tl.constexpr, TILE: tl.constexpr, HAS_ROW_NUMBERS: tl.constexpr,
):  # fmt: skip
    """The tile after row r's at `start`: on its way while that one is worked on."""
    if r + 1 < ROWS:
        following = tl.minimum(first + r + 1, last)
    else:
        following = tl.minimum(first, last)
        start += TILE
    row = _row(logits, row_numbers, following, logits_stride, HAS_ROW_NUMBERS)
    return _load(row, start + tl.arange(0, TILE), start, end, TILE)


@triton.jit
def _greatest_rows(
    best, column, draws, first, last, begin, end, logits, row_numbers, logits_stride,
    ROWS: tl.constexpr, TILE: tl.constexpr, HAS_ROW_NUMBERS: tl.constexpr,
):  # fmt: skip
    """Of rows [ROWS] that do not draw: the greatest logit in columns begin to end, and its column."""
    lane = tl.arange(0, ROWS)
    row = _row(logits, row_numbers, tl.minimum(first, last), logits_stride, HAS_ROW_NUMBERS)
    tile = _load(row, begin + tl.arange(0, TILE), begin, end, TILE)
    for start in range(begin, end, TILE):
        tops = best
        for r in tl.static_range(ROWS):
            following = _next(
                tile, r, first, last, start, end, logits, row_numbers, logits_stride, ROWS, TILE, HAS_ROW_NUMBERS
            )
            values = tile.to(tl.float32)
            tops = tl.where(lane == r, tl.max(tl.where(values != values, float("inf"), values)), tops)
            tile = following
        # After +inf NaN may come; after NaN nothing.
        closer = (draws == 0) & (best == best) & ((tops > best) | (tops == float("inf")))
        if tl.max(closer.to(tl.int32)) > 0:
            for r in tl.static_range(ROWS):
                if tl.max(tl.where(lane == r, closer.to(tl.int32), 0)) > 0:
                    row = _row(logits, row_numbers, tl.minimum(first + r, last), logits_stride, HAS_ROW_NUMBERS)
                    found, where = _find(row, start, end, TILE)
                    seen = tl.where(lane == r, found, best)
                    better = (seen > best) | ((seen != seen) & (best == best))
                    best = tl.where(better, seen, best)
                    column = tl.where(better, where, column)
    return best, column


@triton.jit
def _greatest_scaled(
    first, last, begin, end, logits, row_numbers, temperatures, logits_stride, parameter_stride,
    ROWS: tl.constexpr, TILE: tl.constexpr, HAS_ROW_NUMBERS: tl.constexpr,
):  # fmt: skip
    """[ROWS]: the greatest scaled logit of each row in columns begin to end."""
    lane = tl.arange(0, ROWS)
    greatest = tl.full([ROWS], float("-inf"), tl.float32)
    for start in range(begin, end, TILE):
        for r in tl.static_range(ROWS):
            row = _row(logits, row_numbers, tl.minimum(first + r, last), logits_stride, HAS_ROW_NUMBERS)
            values = _load(row, start + tl.arange(0, TILE), start, end, TILE).to(tl.float32)
            greatest = tl.where(lane == r, tl.maximum(greatest, tl.max(values)), greatest)
    return greatest * _scale(tl.load(temperatures + tl.minimum(first + lane, last) * parameter_stride))


@triton.jit
def _race_rows(
    best, column, draws, greatest, first, last, begin, end, first_id, logits, row_numbers, temperatures, min_ps,
    row_keys, hints, logits_stride, parameter_stride, ROWS: tl.constexpr, TILE: tl.constexpr, SHARES: tl.constexpr,
    CUTS: tl.constexpr, HAS_ROW_NUMBERS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Of rows [ROWS] that draw: the greatest score in columns begin to end, and its column. CUTS: some have a min_p,
    relative to `greatest`, scaled. SHARES: there are other programs for these rows, with hints for each other."""
    lane = tl.arange(0, ROWS)
    hint = tl.full([ROWS], float("-inf"), tl.float32)
    row = _row(logits, row_numbers, tl.minimum(first, last), logits_stride, HAS_ROW_NUMBERS)
    tile = _load(row, begin + tl.arange(0, TILE), begin, end, TILE)
    for start in range(begin, end, TILE):
        if SHARES:
            hint = tl.load(hints + tl.minimum(first + lane, last), volatile=True)
        hashed_ids = _hashed(start + first_id + tl.arange(0, TILE))
        bounds = hint
        for r in tl.static_range(ROWS):
            following = _next(
                tile, r, first, last, start, end, logits, row_numbers, logits_stride, ROWS, TILE, HAS_ROW_NUMBERS
            )
            parameter = tl.minimum(first + r, last) * parameter_stride
            scale = _scale(tl.load(temperatures + parameter))
            bits = _noise_bits(hashed_ids, tl.load(row_keys + parameter))
            # The noise -log(1 - u) is never below u, which is bits / 2**31.
            bound = tl.fma(tile.to(tl.float32), scale, -_log2(bits.to(tl.float32), FAST))
            if CUTS:
                min_p = tl.load(min_ps + parameter)
                lowest = tl.max(tl.where(lane == r, greatest, float("-inf"))) + _log2(tl.maximum(min_p, 1e-30), FAST)
                lowest = tl.where(min_p > 0, lowest - _SLACK, float("-inf"))
                bound = tl.where(tile.to(tl.float32) * scale >= lowest, bound, float("-inf"))
            bounds = tl.where(lane == r, tl.max(bound) + (31.0 + _SLACK), bounds)
            tile = following
        closer = draws & (bounds > tl.maximum(best, hint))
        if tl.max(closer.to(tl.int32)) > 0:
            for r in tl.static_range(ROWS):
                if tl.max(tl.where(lane == r, closer.to(tl.int32), 0)) > 0:
                    index = tl.minimum(first + r, last)
                    row = _row(logits, row_numbers, index, logits_stride, HAS_ROW_NUMBERS)
                    min_p = tl.load(min_ps + index * parameter_stride) if CUTS else 0.0
                    found, where = _race(
                        row, _scale(tl.load(temperatures + index * parameter_stride)),
                        tl.load(row_keys + index * parameter_stride), first_id, start, end,
                        tl.max(tl.where(lane == r, greatest, float("-inf"))), min_p, TILE, CUTS, FAST,
                    )  # fmt: skip
                    better = (lane == r) & (found > best)
                    best = tl.where(better, found, best)
                    column = tl.where(better, where, column)
                    if SHARES and not CUTS:  # what min_p may yet cut off says nothing to others
                        tl.atomic_max(hints + tl.minimum(first + lane, last), best, mask=better, sem="relaxed")
    return best, column


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
def _choose_kernel(
    logits, temperatures, min_ps, row_keys, row_numbers, best_logits, partial, counters, hints, values, token_ids,
    logits_stride, parameter_stride, first_id, num_tokens, num_chunks, num_rows,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr,
    HAS_ROW_NUMBERS: tl.constexpr, HAS_BEST: tl.constexpr, DEPENDENT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Program (c, g): chunk c of ROWS rows. It goes over them by tiles, with a bound on what a tile may hold, and looks
    closer only at those that may hold a new best."""
    chunk = tl.program_id(0)
    group = tl.program_id(1)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    first = group * ROWS
    last = num_rows - 1  # taken again where the last group has fewer rows
    lane = tl.arange(0, ROWS)
    index = tl.minimum(first + lane, last)
    draws = tl.load(temperatures + index * parameter_stride) > 0
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, num_tokens)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    column = tl.full([ROWS], 0, tl.int32) + begin
    greatest = tl.full([ROWS], float("-inf"), tl.float32)
    if tl.min(draws.to(tl.int32)) == 0:
        best, column = _greatest_rows(
            best, column, draws, first, last, begin, end, logits, row_numbers, logits_stride, ROWS, TILE,
            HAS_ROW_NUMBERS,
        )  # fmt: skip
    if tl.max(draws.to(tl.int32)) > 0:
        if tl.max(tl.where(draws, tl.load(min_ps + index * parameter_stride), 0.0)) > 0:
            if HAS_BEST:
                greatest = tl.load(best_logits + index) * _scale(tl.load(temperatures + index * parameter_stride))
            else:
                greatest = _greatest_scaled(
                    first, last, begin, end, logits, row_numbers, temperatures, logits_stride, parameter_stride,
                    ROWS, TILE, HAS_ROW_NUMBERS,
                )  # fmt: skip
            best, column = _race_rows(
                best, column, draws, greatest, first, last, begin, end, first_id, logits, row_numbers, temperatures,
                min_ps, row_keys, hints, logits_stride, parameter_stride, ROWS, TILE, CHUNK > TILE, True,
                HAS_ROW_NUMBERS, FAST,
            )  # fmt: skip
        else:
            best, column = _race_rows(
                best, column, draws, greatest, first, last, begin, end, first_id, logits, row_numbers, temperatures,
                min_ps, row_keys, hints, logits_stride, parameter_stride, ROWS, TILE, CHUNK > TILE, False,
                HAS_ROW_NUMBERS, FAST,
            )  # fmt: skip

    # partial: scores, columns, greatest scaled logits, each [R, C].
    scores = partial
    all_columns = (partial + num_rows * num_chunks).to(tl.pointer_type(tl.int32), bitcast=True)
    maxima = partial + 2 * num_rows * num_chunks
    place = index * num_chunks + chunk
    tl.store(scores + place, best)
    tl.store(all_columns + place, column)
    tl.store(maxima + place, greatest)
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + group, 1, sem="acq_rel")
    if arrived == num_chunks - 1:
        tl.store(counters + group, 0)
        tl.store(hints + index, tl.full([ROWS], float("-inf"), tl.float32))
        for r in range(ROWS):
            line = group * ROWS + r
            if line < num_rows:
                _finish(
                    logits, temperatures, min_ps, row_keys, row_numbers, scores + line * num_chunks,
                    all_columns + line * num_chunks, maxima + line * num_chunks, values, token_ids, line,
                    logits_stride, parameter_stride, first_id, num_tokens, num_chunks, CHUNK, TILE, CHUNKS,
                    HAS_ROW_NUMBERS, HAS_BEST, FAST,
                )  # fmt: skip


@triton.jit
def _finish(
    logits, temperatures, min_ps, row_keys, row_numbers, scores, columns, maxima, values, token_ids, index,
    logits_stride, parameter_stride, first_id, num_tokens, num_chunks, CHUNK: tl.constexpr, TILE: tl.constexpr,
    CHUNKS: tl.constexpr, HAS_ROW_NUMBERS: tl.constexpr, HAS_BEST: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Put a row together from its chunks."""
    number = index.to(tl.int64)
    if HAS_ROW_NUMBERS:
        number = tl.load(row_numbers + index).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    inside = chunks < num_chunks
    of_winners = tl.load(scores + chunks, mask=inside, other=float("-inf"), cache_modifier=".cg")
    winners = tl.load(columns + chunks, mask=inside, other=_NO_COLUMN, cache_modifier=".cg")
    score, column = _best_of(of_winners, winners)
    temperature = tl.load(temperatures + index * parameter_stride)
    min_p = tl.load(min_ps + index * parameter_stride)
    if (temperature > 0) & (min_p > 0) & (not HAS_BEST):
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
                        found, where = _race(row, scale, key, first_id, start, end, greatest, min_p, TILE, True, FAST)
                        if (found > kept) | ((found == kept) & (where < kept_column)):
                            kept = found
                            kept_column = where
        # Nothing is left of a row without a finite logit: any token will do.
        if kept > float("-inf"):
            score = kept
            column = kept_column
    tl.store(values + number, score)
    tl.store(token_ids + number, (first_id + column).to(tl.int64))


@functools.cache
def _shared(device: torch.device, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How many programs of a row group are done, and the best score of a row so far, which spares other programs work.
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
            torch.empty(num_rows, dtype=torch.int64, device=device),
        )
    if num_rows == 0:
        return outputs
    shape = shape or _shape(num_rows, num_tokens)
    num_chunks = max(1, triton.cdiv(num_tokens, shape.chunk))
    partial = torch.empty((3, num_rows, num_chunks), dtype=torch.float32, device=device)
    counters, hints = _shared(device, triton.next_power_of_2(max(num_rows, 256)))
    _choose_kernel[(num_chunks, triton.cdiv(num_rows, shape.rows))](
        logits, temperatures, min_ps, row_keys, logits if row_numbers is None else row_numbers,
        logits if best_logits is None else best_logits, partial, counters, hints, outputs[0], outputs[1],
        logits.stride(0), temperatures.stride(0), first_id, num_tokens, num_chunks, num_rows,
        CHUNK=shape.chunk, ROWS=shape.rows, TILE=shape.tile, CHUNKS=triton.next_power_of_2(num_chunks),
        HAS_ROW_NUMBERS=row_numbers is not None, HAS_BEST=best_logits is not None,
        DEPENDENT=has_dependent_launch(device), FAST=device.type == "cuda",
        num_warps=shape.num_warps, maxnreg=shape.max_registers, **launch_options(device),
    )  # fmt: skip
    return outputs


def _shape(num_rows: int, num_tokens: int) -> Shape:
    """As many programs as a GPU has room for, and no more: the longer a chunk, the less often it finds a new best."""
    if num_rows < 8:
        return Shape(rows=1, tile=1024, chunk=1024, num_warps=4)
    return Shape(rows=2, tile=1024, chunk=8192, num_warps=1)
