"""One token a row drawn with top_k and top_p, on a GPU: no sort, nothing waits. Called by shoal.sampling.

R rows, V vocabulary, C chunks of a row, L rough limits, N candidates of a row.

The tokens are those of `sampling/draws.py`: the same order (the key of `sampling/ordering.py`: distance to the best,
then id), the same integer masses, the same race. What top_k and top_p keep is every token up to some key. Four launches
find it: the best logit; how many tokens, or how much mass, lie within each of L rough limits of it; the tokens within
the narrowest limit that holds enough, as a list; and, a program a row, the key by bisection of the list, and the race.
A list that would be too long is not made: the row itself takes its place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from shoal.kernels.sampling import _hashed, _log2_noise, _noise_bits

_CHUNK = 4096
_TILE = 2048
_DRAW_WARPS = 8
# Candidates of a row that are listed.
_MOST_LISTED = 16384
# A limit is _LIMIT_UNIT (i + 1)²: 0.2, 0.8, 1.8 … 20 below the best scaled logit.
_NUM_LIMITS = tl.constexpr(10)
_LIMIT_UNIT = tl.constexpr(0.2)
# Rough sums are of fp32: a limit must hold this much more than what is wanted.
_MARGIN = tl.constexpr(1.001)
_MASS_SCALE = tl.constexpr(2.0**40)
_UNIFORM_SCALE = tl.constexpr((1 - 2**-24) * 2**-31)
_ID_BITS = tl.constexpr(24)
_ID_MASK = tl.constexpr(2**24 - 1)
_ALL_KEYS = tl.constexpr(2**62)


@triton.jit
def _exp(values, FAST: tl.constexpr):
    """As torch computes it on a GPU."""
    return libdevice.exp(values) if FAST else tl.exp(values)


@triton.jit
def _times(weights, keys, row_key, FAST: tl.constexpr):
    """How soon each token arrives; the soonest wins. keys: of the ordering."""
    token_ids = (keys & _ID_MASK).to(tl.int32)
    bits = _noise_bits(_hashed(token_ids), row_key)
    noise = libdevice.log1p(bits.to(tl.float32) * -_UNIFORM_SCALE) if FAST else -tl.exp2(_log2_noise(bits, FAST))
    return tl.div_rn(weights, noise)


@triton.jit
def _weights(distances, min_p, FAST: tl.constexpr):
    weights = _exp(-distances, FAST)
    return tl.where(weights >= min_p, weights, 0.0)  # NaN has no weight either


@triton.jit
def _distances(row, columns, num_tokens, temperature, best):
    values = tl.load(row + columns, mask=columns < num_tokens, other=float("-inf"))
    return best - tl.div_rn(values, temperature)


@triton.jit(do_not_specialize_on_alignment=["row_numbers"])
def _best_kernel(
    logits, row_numbers, maxima, lengths, logits_stride, num_tokens, num_chunks,
    CHUNK: tl.constexpr, HAS_ROW_NUMBERS: tl.constexpr,
):  # fmt: skip
    """maxima [R, C]. lengths [R] become 0."""
    chunk = tl.program_id(0)
    index = tl.program_id(1)
    number = tl.load(row_numbers + index) if HAS_ROW_NUMBERS else index.to(tl.int64)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + number * logits_stride + columns, mask=columns < num_tokens, other=float("-inf"))
    tl.store(maxima + index * num_chunks + chunk, tl.max(values))
    if chunk == 0:
        tl.store(lengths + index, 0)


@triton.jit
def _scaled_best(maxima, index, num_chunks, temperature, CHUNKS: tl.constexpr):
    chunks = tl.arange(0, CHUNKS)
    all_maxima = tl.load(maxima + index * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf"))
    return tl.div_rn(tl.max(all_maxima), temperature) + 0.0  # never -0: distances from that would be -0 as well


@triton.jit(do_not_specialize_on_alignment=["row_numbers", "temperatures", "min_ps", "top_ks"])
def _survey_kernel(
    logits, row_numbers, temperatures, min_ps, top_ks, maxima, amounts, masses, logits_stride, num_tokens, num_chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, HAS_ROW_NUMBERS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """amounts fp32 [R, L, C]: within each limit, of tokens where top_k is set, else of weights. masses int64 [R, C]."""
    chunk = tl.program_id(0)
    index = tl.program_id(1)
    number = tl.load(row_numbers + index) if HAS_ROW_NUMBERS else index.to(tl.int64)
    temperature = tl.load(temperatures + index)
    best = _scaled_best(maxima, index, num_chunks, temperature, CHUNKS)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    distances = _distances(logits + number * logits_stride, columns, num_tokens, temperature, best)
    if tl.load(top_ks + index) > 0:
        amount = tl.where(distances >= 0, 1.0, 0.0)
    else:
        amount = _weights(distances, tl.load(min_ps + index), FAST)
        tl.store(masses + index * num_chunks + chunk, tl.sum((amount * _MASS_SCALE).to(tl.int64)))
    for i in tl.static_range(_NUM_LIMITS):
        within = tl.where(distances <= _LIMIT_UNIT * (i + 1) * (i + 1), amount, 0.0)
        tl.store(amounts + (index * _NUM_LIMITS + i) * num_chunks + chunk, tl.sum(within))


@triton.jit(do_not_specialize_on_alignment=["row_numbers", "temperatures", "top_ps", "top_ks"])
def _list_kernel(
    logits, row_numbers, temperatures, top_ps, top_ks, maxima, amounts, masses, lengths, limits, listed,
    logits_stride, num_tokens, num_chunks, most_listed,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, HAS_ROW_NUMBERS: tl.constexpr,
):  # fmt: skip
    """listed int64 [R, N]: keys of the tokens within the limit, in any order; lengths [R]: how many, more than
    most_listed where the list is not complete. limits fp32 [R]."""
    chunk = tl.program_id(0)
    index = tl.program_id(1)
    number = tl.load(row_numbers + index) if HAS_ROW_NUMBERS else index.to(tl.int64)
    temperature = tl.load(temperatures + index)
    best = _scaled_best(maxima, index, num_chunks, temperature, CHUNKS)
    chunks = tl.arange(0, CHUNKS)
    inside = chunks < num_chunks
    top_k = tl.load(top_ks + index)
    if top_k > 0:
        wanted = top_k.to(tl.float32)
    else:
        mass = tl.sum(tl.load(masses + index * num_chunks + chunks, mask=inside, other=0))
        share = (mass.to(tl.float64) * tl.load(top_ps + index)).to(tl.float32)
        wanted = share * (_MARGIN / _MASS_SCALE)
    limit = float("inf")
    # From the widest to the narrowest.
    for back in tl.static_range(_NUM_LIMITS):
        i = _NUM_LIMITS - 1 - back
        amount = tl.sum(tl.load(amounts + (index * _NUM_LIMITS + i) * num_chunks + chunks, mask=inside, other=0.0))
        limit = tl.where(amount >= wanted, _LIMIT_UNIT * (i + 1) * (i + 1), limit)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    distances = _distances(logits + number * logits_stride, columns, num_tokens, temperature, best)
    chosen = distances <= limit
    num_chosen = tl.sum(chosen.to(tl.int32))
    if chunk == 0:
        tl.store(limits + index, limit)
    if limit == float("inf"):
        if chunk == 0:
            tl.store(lengths + index, most_listed + 1)
    elif num_chosen > 0:
        start = tl.atomic_add(lengths + index, num_chosen, sem="relaxed")
        places = start + tl.cumsum(chosen.to(tl.int32)) - 1
        keys = (distances.to(tl.int32, bitcast=True).to(tl.int64) << _ID_BITS) | columns
        tl.store(listed + index.to(tl.int64) * most_listed + places, keys, mask=chosen & (places < most_listed))


@triton.jit
def _candidates(
    row, listed, is_listed, start, length, temperature, best, min_p, TILE: tl.constexpr, FAST: tl.constexpr
):
    """Keys int64 [TILE] and weights fp32 [TILE] of candidates; beyond the end keys above all others."""
    places = start + tl.arange(0, TILE)
    if is_listed:
        keys = tl.load(listed + places, mask=places < length, other=_ALL_KEYS)
        distances = (keys >> _ID_BITS).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        distances = _distances(row, places, length, temperature, best)
        keys = (distances.to(tl.int32, bitcast=True).to(tl.int64) << _ID_BITS) | places
        keys = tl.where((places < length) & (distances == distances), keys, _ALL_KEYS)
    return keys, tl.where(keys < _ALL_KEYS, _weights(distances, min_p, FAST), 0.0)


@triton.jit
def _amount_up_to(
    last, counts, row, listed, is_listed, length, temperature, best, min_p, TILE: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Of candidates with keys up to `last`: how many (counts), or their mass. int64."""
    total = tl.full([TILE], 0, tl.int64)
    for start in range(0, length, TILE):
        keys, weights = _candidates(row, listed, is_listed, start, length, temperature, best, min_p, TILE, FAST)
        amount = tl.full([TILE], 1, tl.int64) if counts else (weights * _MASS_SCALE).to(tl.int64)
        total += tl.where(keys <= last, amount, 0)
    return tl.sum(total)


@triton.jit
def _key_that_holds(
    wanted, counts, last, row, num_tokens, listed, is_listed, length, temperature, best, min_p,
    TILE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The least key, below `last`, up to which the amount is `wanted` (fp64); `last` if it is there only."""
    # First to the distance, then, if several tokens may be at that, to the id.
    low = last * 0
    high = last >> _ID_BITS
    while low < high:
        middle = (low + high) >> 1
        key = (middle << _ID_BITS) | _ID_MASK
        amount = _amount_up_to(key, counts, row, listed, is_listed, length, temperature, best, min_p, TILE, FAST)
        if amount.to(tl.float64) >= wanted:
            high = middle
        else:
            low = middle + 1
    low = low << _ID_BITS
    high = tl.minimum(low | _ID_MASK, last)
    several = _amount_up_to(high, True, row, listed, is_listed, length, temperature, best, min_p, TILE, FAST)
    several -= _amount_up_to(low - 1, True, row, listed, is_listed, length, temperature, best, min_p, TILE, FAST)
    if several <= 1:
        low = high
    high = tl.minimum(high, low + num_tokens)
    while low < high:
        middle = (low + high) >> 1
        amount = _amount_up_to(middle, counts, row, listed, is_listed, length, temperature, best, min_p, TILE, FAST)
        if amount.to(tl.float64) >= wanted:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit(
    do_not_specialize_on_alignment=[
        "row_numbers",
        "temperatures",
        "min_ps",
        "top_ps",
        "top_ks",
        "row_keys",
        "token_ids",
    ]
)
def _draw_kernel(
    logits, row_numbers, temperatures, min_ps, top_ps, top_ks, row_keys, maxima, masses, lengths, limits, listed,
    token_ids, logits_stride, num_tokens, num_chunks, most_listed,
    TILE: tl.constexpr, CHUNKS: tl.constexpr, HAS_ROW_NUMBERS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    number = tl.load(row_numbers + index) if HAS_ROW_NUMBERS else index.to(tl.int64)
    row = logits + number * logits_stride
    listed += index.to(tl.int64) * most_listed
    temperature = tl.load(temperatures + index)
    min_p = tl.load(min_ps + index)
    top_p = tl.load(top_ps + index)
    top_k = tl.load(top_ks + index)
    best = _scaled_best(maxima, index, num_chunks, temperature, CHUNKS)
    length = tl.load(lengths + index)
    is_listed = length <= most_listed
    length = tl.where(is_listed, length, num_tokens)
    limit = tl.load(limits + index)
    last = (limit.to(tl.int32, bitcast=True).to(tl.int64) << _ID_BITS) | _ID_MASK
    chunks = tl.arange(0, CHUNKS)
    mass = tl.sum(tl.load(masses + index * num_chunks + chunks, mask=chunks < num_chunks, other=0))
    if top_k > 0:
        last = _key_that_holds(
            top_k.to(tl.float64), True, last, row, num_tokens, listed, is_listed, length, temperature, best, min_p,
            TILE, FAST,
        )  # fmt: skip
        mass = _amount_up_to(last, False, row, listed, is_listed, length, temperature, best, min_p, TILE, FAST)
    if top_p < 1:
        wanted = mass.to(tl.float64) * top_p
        last = _key_that_holds(
            wanted, False, last, row, num_tokens, listed, is_listed, length, temperature, best, min_p, TILE, FAST
        )
    row_key = tl.load(row_keys + index)
    soonest = tl.full([TILE], 0.0, tl.float32)
    winners = tl.full([TILE], _ALL_KEYS, tl.int64)
    for start in range(0, length, TILE):
        keys, weights = _candidates(row, listed, is_listed, start, length, temperature, best, min_p, TILE, FAST)
        times = tl.where(keys <= last, _times(weights, keys, row_key, FAST), 0.0)
        sooner = (times < soonest) | ((times == soonest) & (keys < winners))
        soonest = tl.where(sooner, times, soonest)
        winners = tl.where(sooner, keys, winners)
    winner = tl.min(tl.where(soonest == tl.min(soonest), winners, _ALL_KEYS))
    # Of a row without a finite logit any token will do.
    token = tl.where(winner < _ALL_KEYS, winner & _ID_MASK, 0)
    tl.store(token_ids + number, token)


def draw_truncated(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    min_ps: torch.Tensor,
    top_ps: torch.Tensor,
    top_ks: torch.Tensor,
    row_keys: torch.Tensor,
    token_ids: torch.Tensor,
    row_numbers: torch.Tensor | None = None,
) -> None:
    """Write the tokens of R rows to token_ids int64.

    logits fp32, the whole vocabulary in a row; temperatures (above 0), min_ps fp32 [R]; top_ps fp64 [R], 1 or more for
    none; top_ks int64 [R], 0 for none; row_keys int32 [R]. row_numbers int64 [R]: which lines of logits and token_ids
    these are.
    """
    num_rows, num_tokens, device = temperatures.shape[0], logits.shape[1], logits.device
    if num_rows == 0:
        return
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    num_chunks = triton.cdiv(num_tokens, _CHUNK)
    most_listed = min(_MOST_LISTED, num_tokens)
    maxima = torch.empty((num_rows, num_chunks), dtype=torch.float32, device=device)
    amounts = torch.empty((num_rows, _NUM_LIMITS.value, num_chunks), dtype=torch.float32, device=device)
    masses = torch.empty((num_rows, num_chunks), dtype=torch.int64, device=device)
    limits = torch.empty(num_rows, dtype=torch.float32, device=device)
    lengths = torch.empty(num_rows, dtype=torch.int32, device=device)
    listed = torch.empty((num_rows, most_listed), dtype=torch.int64, device=device)
    numbers = logits if row_numbers is None else row_numbers
    chunked = {"CHUNK": _CHUNK, "HAS_ROW_NUMBERS": row_numbers is not None, "num_warps": 4}
    chunks, fast, stride = triton.next_power_of_2(num_chunks), device.type == "cuda", logits.stride(0)
    grid = (num_chunks, num_rows)
    _best_kernel[grid](logits, numbers, maxima, lengths, stride, num_tokens, num_chunks, **chunked)
    _survey_kernel[grid](
        logits, numbers, temperatures, min_ps, top_ks, maxima, amounts, masses, stride, num_tokens, num_chunks,
        CHUNKS=chunks, FAST=fast, **chunked,
    )  # fmt: skip
    _list_kernel[grid](
        logits, numbers, temperatures, top_ps, top_ks, maxima, amounts, masses, lengths, limits, listed,
        stride, num_tokens, num_chunks, most_listed, CHUNKS=chunks, **chunked,
    )  # fmt: skip
    _draw_kernel[(num_rows,)](
        logits, numbers, temperatures, min_ps, top_ps, top_ks, row_keys, maxima, masses, lengths, limits, listed,
        token_ids, stride, num_tokens, num_chunks, most_listed,
        TILE=_TILE, CHUNKS=chunks, HAS_ROW_NUMBERS=row_numbers is not None, FAST=fast, num_warps=_DRAW_WARPS,
    )  # fmt: skip
