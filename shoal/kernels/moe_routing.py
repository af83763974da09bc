"""Routing of tokens to experts, and their order for the grouped product. Called by layers/routing.py and
quantization/grouped_experts.py. Nothing here waits for the host.

T tokens, E experts, k experts a token; a pair is a token with one of its experts: pair t * k + j.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoal.kernels.launch import has_dependent_launch, launch_options

# Pairs that a program looks at together: of few, and of many.
_CHUNKS = (1024, 4096)


@triton.jit
def _softmax_top_k_kernel(
    logits, weights, ids, E, row_stride, scale,
    NUM_CHOSEN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, NORMALIZE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program a token: k times the greatest, of equal ones the first."""
    row = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(logits + row.to(tl.int64) * row_stride + expert, mask=expert < E, other=float("-inf")).to(tl.float32)
    greatest = tl.max(x, axis=0)
    powers = tl.where(expert < E, tl.exp(x - greatest), 0.0)
    total = tl.sum(powers, axis=0)
    place = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.float32)
    found = tl.zeros([BLOCK_K], tl.int32)
    for index in tl.static_range(NUM_CHOSEN):
        # A row of NaN chooses experts too, whichever.
        best = tl.minimum(tl.argmax(x, axis=0, tie_break_left=True), E - 1)
        power = tl.sum(tl.where(expert == best, powers, 0.0), axis=0)
        chosen = tl.where(place == index, power, chosen)
        found = tl.where(place == index, best, found)
        x = tl.where(expert == best, float("-inf"), x)
    if NORMALIZE:
        total = tl.sum(chosen, axis=0)
    at = row * NUM_CHOSEN + place
    tl.store(weights + at, chosen / total * scale, mask=place < NUM_CHOSEN)
    tl.store(ids + at, found, mask=place < NUM_CHOSEN)


def softmax_top_k(
    logits: torch.Tensor, num_chosen: int, normalize: bool, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] -> (weights fp32, ids int32), both [T, k]; see `layers.routing.SoftmaxTopK`."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    num_rows, num_experts = logits.shape
    weights = torch.empty(num_rows, num_chosen, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, num_chosen, dtype=torch.int32, device=logits.device)
    if num_rows:
        _softmax_top_k_kernel[(num_rows,)](
            logits, weights, ids, num_experts, logits.stride(0), scale,
            NUM_CHOSEN=num_chosen, BLOCK_K=triton.next_power_of_2(num_chosen),
            BLOCK_E=triton.next_power_of_2(num_experts), NORMALIZE=normalize,
            DEPENDENT=has_dependent_launch(logits.device), num_warps=1, **launch_options(logits.device),
        )  # fmt: skip
    return weights, ids


@dataclasses.dataclass(frozen=True)
class PairOrder:
    """Pairs by expert, in blocks that have one expert each. All int32, on the device.

    pairs [T * k]: by expert, then by number; those without an expert here are not in it. experts, starts, counts
    [blocks]: of each block its expert (-1: the block is empty), where it begins in `pairs`, and how many it has.
    """

    pairs: torch.Tensor
    experts: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor


@triton.jit(do_not_specialize=["P", "num_blocks"])
def _order_kernel(
    ids, pairs, experts, starts, counts, tokens, P, E, num_blocks,
    BLOCK: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program an expert, which counts all pairs and places its own; one more says which blocks are empty."""
    own = tl.program_id(0)
    bins = tl.arange(0, BINS)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    sizes = tl.zeros([BINS], tl.int32)
    for first in range(0, P, CHUNK):
        pair = first + tl.arange(0, CHUNK)
        expert = tl.load(ids + pair, mask=pair < P, other=-1).to(tl.int32)
        here = (expert >= 0) & (expert < E)
        sizes += tl.histogram(tl.where(here, expert, E), BINS)
    sizes = tl.where(bins < E, sizes, 0)
    before = bins < own
    start = tl.sum(tl.where(before, sizes, 0), axis=0)
    block = tl.sum(tl.where(before, (sizes + BLOCK - 1) // BLOCK, 0), axis=0)
    if own == E:
        for first in range(block, num_blocks, CHUNK):
            rest = first + tl.arange(0, CHUNK)
            tl.store(experts + rest, tl.full([CHUNK], -1, tl.int32), mask=rest < num_blocks)
    else:
        size = tl.sum(tl.where(bins == own, sizes, 0), axis=0)
        for first in range(0, tl.cdiv(size, BLOCK), CHUNK):
            index = first + tl.arange(0, CHUNK)
            inside = index * BLOCK < size
            tl.store(experts + block + index, tl.zeros([CHUNK], tl.int32) + own, mask=inside)
            tl.store(starts + block + index, start + index * BLOCK, mask=inside)
            tl.store(counts + block + index, tl.minimum(size - index * BLOCK, BLOCK), mask=inside)
        for first in range(0, P, CHUNK):
            pair = first + tl.arange(0, CHUNK)
            mine = (tl.load(ids + pair, mask=pair < P, other=-1).to(tl.int32) == own) & (pair < P)
            place = start + tl.cumsum(mine.to(tl.int32), axis=0) - 1
            tl.store(pairs + place, pair, mask=mine)
            start += tl.sum(mine.to(tl.int32), axis=0)
        tl.store(tokens + own, tl.load(tokens + own) + size)


def order_pairs(ids: torch.Tensor, tokens: torch.Tensor, block: int) -> PairOrder:
    """ids [T, k], below 0 for no expert here; blocks of up to `block` pairs. tokens int64 [E] grows by what each expert
    gets."""
    num_pairs, num_experts, device = ids.numel(), len(tokens), ids.device
    num_blocks = max(1, min(num_pairs, num_pairs // block + num_experts))
    # All three rows begin at a multiple of 16 bytes: kernels are compiled for pointers that do, and for others anew.
    num_blocks = -(-num_blocks // 4) * 4
    pairs = torch.empty(max(1, num_pairs), dtype=torch.int32, device=device)
    blocks = torch.empty(3, num_blocks, dtype=torch.int32, device=device)
    _order_kernel[(num_experts + 1,)](
        ids.contiguous(), pairs, blocks[0], blocks[1], blocks[2], tokens, num_pairs, num_experts, num_blocks,
        BLOCK=block, BINS=triton.next_power_of_2(num_experts + 1), CHUNK=_CHUNKS[num_pairs > 2 * _CHUNKS[1]],
        DEPENDENT=has_dependent_launch(device), num_warps=8, **launch_options(device),
    )  # fmt: skip
    return PairOrder(pairs, blocks[0], blocks[1], blocks[2])
