"""What a KV cache holds, for the attention kernels: numbers as the model has them, or 8-bit floats in bytes.

8-bit floats are written by integer operations, so that all GPUs and the interpreter round alike: to nearest even, and
what is too large becomes the largest number. GPUs from sm_89 on read e4m3 by their own instructions, others by bits.
Values are those of `torch.float8_e4m3fn` and `torch.float8_e5m2`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

# FORMAT of a kernel: 0 as the model has it, 1 e4m3, 2 e5m2, 3 e4m3 that is read by bits. e5m2 always is: its bits are
# the upper ones of a half.
_FORMATS = {torch.float8_e4m3fn: 1, torch.float8_e5m2: 2}


def cache_format(cache: torch.Tensor) -> int:
    """FORMAT of the kernels that read this cache."""
    if cache.dtype is torch.float8_e4m3fn and not _reads_natively(cache.device):
        return 3
    return _FORMATS.get(cache.dtype, 0)


@functools.cache
def _reads_natively(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def cache_cells(cache: torch.Tensor) -> torch.Tensor:
    """The cache as kernels take it: 8-bit floats as bytes."""
    return cache.view(torch.uint8) if cache.dtype in _FORMATS else cache


@triton.jit
def encode(x, inverse_scale, FORMAT: tl.constexpr):
    """x as the cache holds it."""
    found = x
    if FORMAT == 1 or FORMAT == 3:
        found = _round(x.to(tl.float32) * inverse_scale, 448.0, 3, 120, 0.015625, 16384.0, 0x46800000)
    elif FORMAT == 2:
        found = _round(x.to(tl.float32) * inverse_scale, 57344.0, 2, 112, 0.00006103515625, 128.0, 0x43000000)
    return found


@triton.jit
def _round(
    wide, LIMIT: tl.constexpr, MANTISSA: tl.constexpr, REBIAS: tl.constexpr, SMALLEST_NORMAL: tl.constexpr,
    MAGIC: tl.constexpr, MAGIC_BITS: tl.constexpr,
):  # fmt: skip
    """fp32 -> the bits of the nearest number, uint8. MAGIC, and its bits: its unit in the last place is the smallest
    number of the format, so that to add it rounds to a multiple of that."""
    wide = tl.where(wide > LIMIT, LIMIT, wide)
    wide = tl.where(wide < -LIMIT, -LIMIT, wide)
    bits = wide.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    absolute = magnitude.to(tl.float32, bitcast=True)
    odd = (magnitude >> (23 - MANTISSA)) & 1
    normal = ((magnitude + ((1 << (22 - MANTISSA)) - 1) + odd) >> (23 - MANTISSA)) - (REBIAS << MANTISSA)
    tiny = (absolute + MAGIC).to(tl.uint32, bitcast=True) - MAGIC_BITS
    found = tl.where(absolute < SMALLEST_NORMAL, tiny, normal)
    found = tl.where(magnitude > 0x7F800000, 0x7F, found)  # no number
    return (((bits >> 24) & 0x80) | found).to(tl.uint8)


@triton.jit
def decode(x, TYPE: tl.constexpr, FORMAT: tl.constexpr):
    """What a kernel loaded from the cache as numbers of TYPE, exactly."""
    found = x
    if FORMAT == 1:
        found = x.to(tl.float8e4nv, bitcast=True).to(TYPE)
    elif FORMAT == 2:
        found = (x.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(TYPE)
    elif FORMAT == 3:
        # The same bits as a half are 2 ** 8 times too small, subnormal numbers too.
        wide = x.to(tl.uint16)
        half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        found = tl.where((wide & 0x7F) == 0x7F, float("nan"), value).to(TYPE)
    return found
