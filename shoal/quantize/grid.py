"""Numbers that weights are rounded to: integers of a few bits with a scale and a zero for each group, FP8, INT8.

W [N, K]: outputs, inputs. G: groups of inputs.
"""

from __future__ import annotations

import dataclasses

import torch

FP8_MOST = 448.0
# Smallest scale: an fp16 that is not zero. Weights below it are nothing beside all others.
_SMALLEST = 2.0**-22


@dataclasses.dataclass(frozen=True)
class Grid:
    """scales, zeros fp32 [N]: a weight is (integer - zero) * scale, integers 0 to 2^bits - 1."""

    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int

    def integers(self, weight: torch.Tensor) -> torch.Tensor:
        """weight [N, k] -> the nearest, fp32."""
        most = (1 << self.bits) - 1
        return (torch.round(weight / self.scales[:, None]) + self.zeros[:, None]).clamp_(0, most)

    def values(self, integers: torch.Tensor) -> torch.Tensor:
        return (integers - self.zeros[:, None]) * self.scales[:, None]


def find_grid(weight: torch.Tensor, bits: int, symmetric: bool) -> Grid:
    """For the weights [N, k] of one group. Scales are fp16 numbers, as they are stored.

    Zeros are at least 1: readers of GPTQ add one to what is stored, not all modulo 2^bits.
    """
    most = (1 << bits) - 1
    if symmetric:
        scales = weight.abs().amax(1) * 2 / most
        zeros = torch.full_like(scales, 1 << (bits - 1))
    else:
        low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
        scales = (high - low) / most
        zeros = torch.zeros_like(scales)
    scales = scales.clamp(min=_SMALLEST).to(torch.float16).float()
    if not symmetric:
        zeros = torch.round(-low / scales).clamp_(1, most)
    return Grid(scales, zeros, bits)


@dataclasses.dataclass(frozen=True)
class IntegerWeight:
    """integers uint8 [N, K]; scales fp32, zeros uint8 [G, N]; groups int64 [K]: the group of each input."""

    integers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    groups: torch.Tensor
    bits: int

    def values(self) -> torch.Tensor:
        """fp32 [N, K]."""
        scales, zeros = self.scales[self.groups].t(), self.zeros.float()[self.groups].t()
        return (self.integers.float() - zeros) * scales


def round_to_nearest(
    weight: torch.Tensor, bits: int, group_size: int, symmetric: bool, mask: torch.Tensor | None = None
) -> IntegerWeight:
    """weight fp32 [N, K]; mask bool [N, K]: weights that become zero."""
    size = group_size if group_size > 0 else weight.shape[1]
    if mask is not None:
        weight = weight.masked_fill(mask, 0)
    integers, scales, zeros = [], [], []
    for group in weight.split(size, 1):
        grid = find_grid(group, bits, symmetric)
        integers.append(grid.integers(group).to(torch.uint8))
        scales.append(grid.scales)
        zeros.append(grid.zeros.to(torch.uint8))
    groups = torch.arange(weight.shape[1], device=weight.device) // size
    return IntegerWeight(torch.cat(integers, 1), torch.stack(scales), torch.stack(zeros), groups, bits)


def round_bytes(
    weight: torch.Tensor, dtype: torch.dtype, by_output: bool, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """To FP8 or INT8: (numbers [N, K], scales in scale_dtype, [N, 1] or [1])."""
    most = FP8_MOST if dtype == torch.float8_e4m3fn else 127.0
    largest = weight.abs().amax(1, keepdim=True) if by_output else weight.abs().amax().reshape(1)
    scales = (largest / most).clamp(min=_SMALLEST).to(scale_dtype)
    scaled = weight / scales.float()
    if dtype == torch.int8:
        scaled = torch.round(scaled)
    return scaled.clamp(-most, most).to(dtype), scales
