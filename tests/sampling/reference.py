"""Sampling of one row, slow and plain: Python numbers and loops, written from the documentation of SamplingParams."""

from __future__ import annotations

import math

import numpy as np

from shoal.types import SamplingParams
from shoal.types.seeds import GOLDEN_GAMMA, mix64

NEVER = -math.inf
MASK_32 = 2**32 - 1


def to_signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


def lowbias32(value: int) -> int:
    value ^= value >> 16
    value = value * 0x7FEB352D & MASK_32
    value ^= value >> 15
    value = value * 0x846CA68B & MASK_32
    return value ^ (value >> 16)


def row_key(seed: int, position: int) -> int:
    return mix64(mix64(seed) + (position + 1) * GOLDEN_GAMMA) >> 32


def noise_bits(seed: int, position: int, token_id: int) -> int:
    value = lowbias32(token_id) ^ row_key(seed, position)
    for multiplier, shift in ((0x7FEB352D, 15), (0x846CA68B, 16)):
        value = value * multiplier & MASK_32
        # Python shifts negative numbers arithmetically, as torch does.
        value = (value ^ (to_signed(value) >> shift)) & MASK_32
    return value


def exponential(seed: int, position: int, token_id: int) -> float:
    return -math.log1p(-(noise_bits(seed, position, token_id) | 1) * (1 - 2**-24) * 2**-31)


def processed_logits(
    logits: np.ndarray, params: SamplingParams, token_ids: list[int], num_prompt_tokens: int, position: int
) -> list[float]:
    """Logits after masks and penalties. token_ids: all before `position`."""
    prompt, output = token_ids[:num_prompt_tokens], token_ids[num_prompt_tokens:]
    ended = [*params.eos_token_ids, *(params.stop_token_ids or [])]
    result = []
    for token_id, raw in enumerate(logits.tolist()):
        value = raw + (params.logit_bias or {}).get(token_id, 0.0)
        if params.allowed_token_ids is not None and token_id not in params.allowed_token_ids:
            value = NEVER
        if token_id in (params.bad_words_token_ids or []):
            value = NEVER
        if position - num_prompt_tokens < params.min_tokens and token_id in ended:
            value = NEVER
        if token_id in prompt or token_id in output:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * output.count(token_id)
        value -= params.presence_penalty * (token_id in output)
        result.append(value)
    return result


def kept_weights(logits: list[float], params: SamplingParams, slack: float = 0.0) -> dict[int, float]:
    """Token id -> weight relative to the best, of what min_p, top_k and top_p keep. slack > 0 keeps a little more."""
    best = max(logits)
    scaled = {i: math.exp((value - best) / params.temperature) for i, value in enumerate(logits) if value > NEVER}
    kept = {i: weight for i, weight in scaled.items() if weight >= min(1.0, params.min_p * (1 - slack))}
    order = sorted(kept, key=lambda i: (-logits[i], i))
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1:
        total = sum(kept[i] for i in order)
        mass, until = 0.0, 0
        while until < len(order) and (until == 0 or mass < params.top_p * total * (1 + slack)):
            mass += kept[order[until]]
            until += 1
        order = order[:until]
    return {i: kept[i] for i in order}


def check_token(token_id: int, logits: list[float], params: SamplingParams, position: int) -> None:
    """Raise AssertionError unless `token_id` is what these processed logits yield, up to rounding of float32."""
    if params.greedy:
        assert logits[token_id] >= max(logits) - 1e-5 * (1 + abs(max(logits)))
        return
    assert params.seed is not None
    surely, perhaps = kept_weights(logits, params, -1e-4), kept_weights(logits, params, 1e-4)

    def speed(kept: dict[int, float], candidate: int) -> float:
        return kept[candidate] / exponential(params.seed, position, candidate)

    assert token_id in perhaps, f"{token_id} was cut off; kept {sorted(perhaps)}"
    fastest = max(speed(surely, candidate) for candidate in surely)
    assert speed(perhaps, token_id) >= fastest * (1 - 3e-4)
