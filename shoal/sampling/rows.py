"""Rows of a step that take the same path: gather them, write them back, upload what the host knows about them.

`rows` is an int64 tensor [G] of row numbers, or None for all rows: then nothing is copied.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ELEMENTS_AT_ONCE_CPU = 2**19
_ELEMENTS_AT_ONCE = 2**26


def take_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    """values[rows]: a copy, or `values` itself for all rows. Changes made in place need `put_rows` afterwards."""
    return values if rows is None else values.index_select(0, rows)


def put_rows(values: Tensor, rows: Tensor | None, changed: Tensor) -> None:
    """Write back what `take_rows` gave and the caller changed in place."""
    if rows is not None:
        values.index_copy_(0, rows, changed)


def num_rows_at_once(values: Tensor) -> int:
    """How many rows of values [R, V] to work on at a time: the temporaries then stay in a CPU's cache (twice as fast as
    fresh memory), or small beside a GPU's memory."""
    max_elements = _ELEMENTS_AT_ONCE_CPU if values.device.type == "cpu" else _ELEMENTS_AT_ONCE
    return max(1, max_elements // values.shape[1])


def upload(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A fresh host array as a tensor on the device, without waiting for the device."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        # Pinned memory comes from torch's caching host allocator, which keeps it until the copy is done.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def upload_rows(rows: npt.NDArray[np.int64], num_rows: int, device: torch.device) -> Tensor | None:
    """Row numbers, ascending, as a tensor; None where they are all rows of the step."""
    return None if rows.size == num_rows else upload(rows, device)
