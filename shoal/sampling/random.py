"""Counter-based randomness: noise is a pure function of (seed, position, token id). Called by the sampler.

Shapes: R rows, V vocabulary, K candidates.

Two stages, integers only, so that CPU and CUDA yield the same bits:

1. Row key, on the host, 64-bit: output number `position` of the SplitMix64 sequence whose state is mix64(seed); its
   upper 32 bits are kept. (SplitMix64 can jump: output i is mix64(state + (i + 1) * gamma).)
2. Noise, on the device, 32-bit: the token id goes through `lowbias32`, once per vocabulary; this table XOR row key
   goes through two multiply-xorshift rounds with the same constants. lowbias32 and its constants: Chris Wellons,
   "Prospecting for hash functions" (2018), public domain, found by search for the least avalanche bias.

The shifts of stage 2 are arithmetic, because torch has no logical one: x ^ (x >> n) then maps x and ~x to the same
non-negative value, exactly two to one. So the result is uniform over 31 bits, and the masks that a logical shift would
need (a pass over R x V each) are saved.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.types.seeds import GOLDEN_GAMMA, MIX_MULTIPLIER_1, MIX_MULTIPLIER_2

_GAMMA = np.uint64(GOLDEN_GAMMA)
_MULTIPLIER_1 = np.uint64(MIX_MULTIPLIER_1)
_MULTIPLIER_2 = np.uint64(MIX_MULTIPLIER_2)
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))

_LOWBIAS_1 = 0x7FEB352D
_LOWBIAS_2 = 0x846CA68B
# The second constant as the int32 of the same bits: torch multiplies int32 modulo 2**32.
_LOWBIAS_2_SIGNED = _LOWBIAS_2 - 2**32
# 31-bit integers to (0, 1): the largest becomes 1 - 2**-24, the float32 next to 1.
_UNIFORM_SCALE = (1 - 2**-24) * 2**-31


def mix64_array(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`shoal.types.seeds.mix64` for each element of an array."""
    values = (values ^ (values >> _SHIFTS[0])) * _MULTIPLIER_1
    values = (values ^ (values >> _SHIFTS[1])) * _MULTIPLIER_2
    return values ^ (values >> _SHIFTS[2])


def row_keys(mixed_seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    """Stage 1. mixed_seeds [R]: mix64(seed). positions [R]: index of the token to be sampled. Returns keys [R]."""
    mixed = mix64_array(mixed_seeds + (positions + np.uint64(1)) * _GAMMA)
    return (mixed >> np.uint64(32)).astype(np.uint32).view(np.int32)


def token_hashes(vocab_size: int, device: torch.device) -> Tensor:
    """lowbias32 of the ids 0 … vocab_size - 1, as int32 [V]. Made once per vocabulary."""
    values: npt.NDArray[np.uint32] = np.arange(vocab_size, dtype=np.uint32)
    values = (values ^ (values >> np.uint32(16))) * np.uint32(_LOWBIAS_1)
    values = (values ^ (values >> np.uint32(15))) * np.uint32(_LOWBIAS_2)
    values = values ^ (values >> np.uint32(16))
    return torch.from_numpy(values.view(np.int32)).to(device)


def noise_bits(keys: Tensor, hashed_ids: Tensor) -> Tensor:
    """Stage 2. keys int32 [R]; hashed_ids int32 [V] (all ids) or [R, K] (each row's own). Uniform over [0, 2**31)."""
    bits = torch.bitwise_xor(hashed_ids, keys.unsqueeze(1))
    shifted = torch.empty_like(bits)
    bits.mul_(_LOWBIAS_1)
    bits.bitwise_xor_(torch.bitwise_right_shift(bits, 15, out=shifted))
    bits.mul_(_LOWBIAS_2_SIGNED)
    return bits.bitwise_xor_(torch.bitwise_right_shift(bits, 16, out=shifted))


def negative_exponentials(keys: Tensor, hashed_ids: Tensor) -> Tensor:
    """Minus one times independent exponential(1) variables, fp32 [R, V] or [R, K], all of them finite and below 0.

    The token with the least weight / value then is a draw in proportion to the weights: the exponential race, which is
    Gumbel-max with one logarithm less. log1p(-u) keeps the full precision of u where it matters, near 0: the winner of
    a large vocabulary has a value of about -1 / V.
    """
    # An even number and the odd one after it share a value: u is never 0.
    uniform = noise_bits(keys, hashed_ids).bitwise_or_(1).to(torch.float32)
    return uniform.mul_(-_UNIFORM_SCALE).log1p_()
