"""Reads pieces of the tensors of a safetensors file, straight to where they belong. Used by files.py.

The format (github.com/huggingface/safetensors): 8 bytes with the length of a JSON header, which gives each tensor's
type, shape and place; then the numbers, row by row. Bytes are read, not mapped: what a process maps counts as its own
memory until it is unmapped, and columns of a matrix lie on all of its pages.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shoal.errors import ModelError

Index = Sequence[slice]

# What has to be converted or brought to a GPU is read in blocks of at most this many bytes.
_BLOCK_BYTES = 16 << 20
_LONGEST_HEADER = 100 << 20
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclasses.dataclass(frozen=True)
class _Stored:
    """start: where the tensor's first byte is in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class SafetensorsFile:
    """num_bytes_read counts what was read of the tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes_read = 0
        self._block: torch.Tensor | None = None
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._broken(error) from None
        try:
            self._tensors = self._read_header()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            os.close(self._descriptor)
            raise self._broken(error) from None

    def close(self) -> None:
        os.close(self._descriptor)

    def names(self) -> list[str]:
        """In the order in which they lie in the file."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read_into(self, name: str, index: Index, destination: torch.Tensor) -> None:
        """Fill `destination`, of the shape of the piece, on any device and of any type."""
        stored = self._tensors[name]
        if not stored.shape:
            index, destination = (slice(0, 1),), destination.view(1)
        if destination.numel():
            self._read(stored.dtype, stored.start, stored.shape or (1,), index, destination)

    # --- the header --------------------------------------------------------------------------------------------

    def _read_header(self) -> dict[str, _Stored]:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise ValueError(f"its {size} bytes do not begin with a header")
        header: dict[str, dict[str, Any]] = json.loads(os.pread(self._descriptor, length, 8))
        if not isinstance(header, dict):
            raise ValueError(f"its header is a {type(header).__name__}")
        header.pop("__metadata__", None)
        by_place = sorted(header.items(), key=lambda item: int(item[1]["data_offsets"][0]))
        return {name: self._stored(name, entry, 8 + length, size) for name, entry in by_place}

    def _stored(self, name: str, entry: dict[str, Any], data_start: int, size: int) -> _Stored:
        if entry["dtype"] not in _TYPES:
            raise ValueError(f"tensor {name} is of type {entry['dtype']}; known: {', '.join(_TYPES)}")
        dtype, shape = _TYPES[entry["dtype"]], tuple(int(length) for length in entry["shape"])
        first, last = (int(offset) for offset in entry["data_offsets"])
        if last - first != math.prod(shape) * dtype.itemsize or first < 0:
            raise ValueError(f"tensor {name} of shape {list(shape)} is said to take {last - first} bytes")
        if data_start + last > size:
            raise ValueError(f"tensor {name} ends at byte {data_start + last} of {size}")
        return _Stored(dtype, shape, data_start + first)

    def _broken(self, error: Exception) -> ModelError:
        reason = error if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        return ModelError(f"{self.path} is not a whole safetensors file: {reason}; download it again")

    # --- the numbers -------------------------------------------------------------------------------------------

    def _read(
        self, dtype: torch.dtype, start: int, shape: tuple[int, ...], index: Index, destination: torch.Tensor
    ) -> None:
        """A piece of the tensor whose first byte is at `start`."""
        stride = math.prod(shape[1:]) * dtype.itemsize
        offsets, run_bytes = _runs(shape[1:], index[1:], dtype.itemsize)
        row_bytes = len(offsets) * run_bytes
        first = index[0].start
        if row_bytes > _BLOCK_BYTES:
            for row, part in enumerate(destination, first):
                self._read(dtype, start + row * stride, shape[1:], index[1:], part)
            return
        step = max(1, _BLOCK_BYTES // row_bytes)
        for row, part in zip(range(first, index[0].stop, step), destination.split(step), strict=True):
            num_bytes = part.shape[0] * row_bytes
            in_place = part.dtype == dtype and part.device.type == "cpu" and part.is_contiguous()
            block = part.view(-1).view(torch.uint8) if in_place else self._block_on_the_way_to(part)[:num_bytes]
            self._fill(memoryview(block.numpy()), start + row * stride, stride, offsets, run_bytes)
            self.num_bytes_read += num_bytes
            if not in_place:
                part.copy_(block.view(dtype).view(part.shape))

    def _fill(self, block: memoryview, start: int, stride: int, offsets: list[int], run_bytes: int) -> None:
        """Rows that are `stride` bytes apart, of each the runs at these offsets."""
        row_bytes = len(offsets) * run_bytes
        if row_bytes == stride:
            self._read_run(block, start)
            return
        num_rows = len(block) // row_bytes
        # Whole rows come into the page cache in one go, once a host; single runs would be small reads all over a disk.
        os.posix_fadvise(self._descriptor, start, num_rows * stride, os.POSIX_FADV_WILLNEED)
        position = 0
        for row_start in range(start, start + num_rows * stride, stride):
            for offset in offsets:
                self._read_run(block[position : position + run_bytes], row_start + offset)
                position += run_bytes

    def _read_run(self, block: memoryview, start: int) -> None:
        while block:
            num_bytes = os.preadv(self._descriptor, [block], start)
            if not num_bytes:
                raise self._broken(ValueError(f"it ended at byte {start} while it was read"))
            block, start = block[num_bytes:], start + num_bytes

    def _block_on_the_way_to(self, destination: torch.Tensor) -> torch.Tensor:
        """uint8 [_BLOCK_BYTES], used again and again."""
        if self._block is None:
            self._block = torch.empty(_BLOCK_BYTES, dtype=torch.uint8, pin_memory=destination.is_cuda)
        return self._block


def _runs(shape: tuple[int, ...], index: Index, itemsize: int) -> tuple[list[int], int]:
    """(offsets, length) in bytes of the runs that make up a piece of a tensor; one of them for a whole tensor."""
    if not shape:
        return [0], itemsize
    offsets, length = _runs(shape[1:], index[1:], itemsize)
    stride, rows = math.prod(shape[1:]) * itemsize, range(index[0].start, index[0].stop)
    if length == stride:
        return [rows.start * stride], len(rows) * stride
    return [row * stride + offset for row in rows for offset in offsets], length
