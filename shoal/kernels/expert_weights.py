"""How the weights of a layer's experts are held on a GPU, and how a product of many rows with them is cut.

E experts, K inputs, N outputs of a product (of the gated one its gates).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Self

import torch

# What is made of gate and up: as is (no gate), silu(gate) * up, gpt-oss' clamped form.
PLAIN, SILU, CLAMPED = 0, 1, 2
KINDS = {None: PLAIN, "silu": SILU, "clamped": CLAMPED}


@dataclasses.dataclass(frozen=True)
class GroupedTiles:
    """How a grouped product is cut. Visible in its bits are gates_apart, and block_k where scales are of blocks, whose
    sums it makes. weight_left: it is the left operand. gates_apart: what is made of gates and ups is no part of the
    product, whose sums fill the registers."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    weight_left: bool = False
    gates_apart: bool = False


# By how many pairs an expert gets if all get as many: up to so many, these.
Tiles = tuple[tuple[float, GroupedTiles], ...]
_TILES = (
    (12, GroupedTiles(16, 64, 128, 4, 4, weight_left=True)),
    (24, GroupedTiles(32, 64, 128, 4, 3, weight_left=True)),
    (96, GroupedTiles(64, 64, 64, 4, 4)),
    (float("inf"), GroupedTiles(128, 128, 64, 8, 3)),
)
_FP32_TILES = ((16, GroupedTiles(16, 32, 32, 4, 2)), (float("inf"), GroupedTiles(64, 64, 32, 8, 2)))
# The weight is left everywhere: converted in registers, it goes from there to the matrix units.
_BYTE_TILES = (
    (12, GroupedTiles(16, 64, 128, 4, 3, weight_left=True)),
    (24, GroupedTiles(32, 64, 128, 4, 3, weight_left=True)),
    (96, GroupedTiles(64, 64, 128, 4, 3, weight_left=True)),
    (float("inf"), GroupedTiles(128, 128, 64, 8, 3, weight_left=True)),
)
# A block's sum is one more beside those of gate and up in the registers.
_BLOCK_TILES = (
    *_BYTE_TILES[:2],
    (96, GroupedTiles(64, 64, 64, 4, 4, weight_left=True)),
    (float("inf"), GroupedTiles(64, 128, 64, 8, 3, weight_left=True)),
)
_WGMMA_BLOCK_TILES = (
    *_BYTE_TILES[:3],
    (float("inf"), GroupedTiles(128, 128, 64, 8, 3, weight_left=True, gates_apart=True)),
)
_FP32_BYTE_TILES = ((16, GroupedTiles(16, 32, 16, 4, 2)), (float("inf"), GroupedTiles(32, 64, 32, 8, 2)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertRows:
    """Of a product's weight: what is the same however it is held. bias [E, rows] or None. Of a gated product rows are
    2 N: gates first, or by turns."""

    bias: torch.Tensor | None = None
    kind: int = PLAIN
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = float("inf")

    @property
    def num_experts(self) -> int:
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        raise NotImplementedError

    def tiles(self, dtype: torch.dtype) -> Tiles:
        """For rows of x of `dtype`."""
        raise NotImplementedError

    def every_tiles(self, dtype: torch.dtype) -> list[GroupedTiles]:
        """All that may be chosen."""
        return [tiles for _, tiles in self.tiles(dtype)]

    def choose_tiles(self, num_pairs: float, dtype: torch.dtype) -> GroupedTiles:
        """By speed alone. num_pairs: that go to the experts here, if all of the layer get as many."""
        return next(tiles for most, tiles in self.tiles(dtype) if num_pairs <= most * self.num_experts)

    def apart(self) -> Self:
        """Of a gated product its gates and ups as they are."""
        return dataclasses.replace(self, kind=PLAIN)

    @property
    def num_outputs(self) -> int:
        return self.num_rows // (1 if self.kind == PLAIN else 2)

    @property
    def row_step(self) -> int:
        """From the gate of an output to that of the next, in rows; `up_offset`: from a gate to its up."""
        return 2 if self.interleaved and self.kind != PLAIN else 1

    @property
    def up_offset(self) -> int:
        return 1 if self.interleaved else self.num_outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertWeight(ExpertRows):
    """weight [E, rows, K].

    scales: of a weight of a byte an element, fp32, one a row: [E, rows]; or with `block` (rows, inputs)
    [E, rows / block, K / block], rounded up. As of `linear.ByteScales`, also where the weight is uint8.
    """

    weight: torch.Tensor
    scales: torch.Tensor | None = None
    block: tuple[int, int] | None = None

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    @property
    def num_rows(self) -> int:
        return self.weight.shape[1]

    def tiles(self, dtype: torch.dtype) -> Tiles:
        """With as many stages as this GPU's shared memory holds."""
        tables = (_TILES, _FP32_TILES)
        if self.scales is not None:
            by_block = _WGMMA_BLOCK_TILES if has_wgmma(self.weight.device) else _BLOCK_TILES
            tables = (_BYTE_TILES if self.block is None else by_block, _FP32_BYTE_TILES)
        return _fitting(tables[dtype is torch.float32], dtype.itemsize, self.weight.itemsize, self.weight.device)

    @property
    def forms(self) -> dict[str, int | bool]:
        """What kernels must know of how it is held."""
        outputs, inputs = self.block or (1, 1)
        scales = 0 if self.scales is None else 2 if self.block else 1
        is_fp8_bits = self.weight.dtype is torch.uint8
        return {"FP8_BITS": is_fp8_bits, "SCALES": scales, "SCALE_N": outputs, "SCALE_K": inputs}


def has_wgmma(device: torch.device) -> bool:
    """Whether it is a Hopper, whose matrix units read operands from shared memory: larger blocks are worth their
    registers. None before or after has these instructions."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def _fitting(table: Tiles, row_bytes: int, weight_bytes: int, device: torch.device) -> Tiles:
    """row_bytes, weight_bytes: of an element."""
    shared_bytes = 1 << 20  # interpreted
    if device.type == "cuda":
        shared_bytes = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    fitting = []
    for most, tiles in table:
        stage_bytes = (tiles.block_m * row_bytes + 2 * tiles.block_n * weight_bytes) * tiles.block_k
        num_stages = max(1, min(tiles.num_stages, shared_bytes // stage_bytes))
        fitting.append((most, dataclasses.replace(tiles, num_stages=num_stages)))
    return tuple(fitting)
