"""Seeds: reduced to 64 bits, and one of their own for each of the n answers. Called by whoever accepts a request.

The mixing is SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014) with the
finalizer constants of Stafford's variant 13. `shoal.sampling.random` mixes (seed, position) with the same constants.
"""

from __future__ import annotations

MASK_64 = 2**64 - 1
# 2**64 divided by the golden ratio, odd: the step of the SplitMix64 sequence.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MIX_MULTIPLIER_2 = 0x94D049BB133111EB
# Keeps the answers' seeds apart from the noise that a seed yields at positions 0, 1, 2 … (bytes of "choice i").
_CHOICE_DOMAIN = 0x63686F6963652069


def mix64(value: int) -> int:
    """SplitMix64's finalizer: a bijection of 64-bit integers in which each input bit flips half of the output bits."""
    value &= MASK_64
    value = ((value ^ (value >> 30)) * MIX_MULTIPLIER_1) & MASK_64
    value = ((value ^ (value >> 27)) * MIX_MULTIPLIER_2) & MASK_64
    return value ^ (value >> 31)


def reduce_seed(seed: int) -> int:
    """Any Python integer, negative or of any size, as one of [0, 2**64)."""
    return seed & MASK_64


def derive_seed(seed: int, choice_index: int) -> int:
    """The seed, in [0, 2**64), of answer `choice_index` of a request whose seed is `seed` (any integer)."""
    state = mix64(reduce_seed(seed) ^ _CHOICE_DOMAIN)
    return mix64(state + (choice_index + 1) * GOLDEN_GAMMA)
