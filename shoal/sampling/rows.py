"""Rows of a step that take the same path: gather them, write them back, upload what the host knows about them.

`rows` is an int64 tensor [G] of row numbers, or None for all rows: then nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def take_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    """values[rows]: a copy, or `values` itself for all rows. Changes made in place need `put_rows` afterwards."""
    return values if rows is None else values.index_select(0, rows)


def put_rows(values: Tensor, rows: Tensor | None, changed: Tensor) -> None:
    """Write back what `take_rows` gave and the caller changed in place."""
    if rows is not None:
        values.index_copy_(0, rows, changed)


def upload(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A fresh host array as a tensor on the device, without waiting for the device."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        # Pinned memory comes from torch's caching host allocator, which keeps it until the copy is done.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def upload_rows(rows: Sequence[int], num_rows: int, device: torch.device) -> Tensor | None:
    """Row numbers, ascending, as a tensor; None where they are all rows of the step."""
    if len(rows) == num_rows:
        return None
    return upload(np.array(rows, dtype=np.int64), device)


def upload_column(values: Sequence[float], device: torch.device, dtype: npt.DTypeLike = np.float32) -> Tensor:
    """One value a row as a tensor [G, 1]."""
    return upload(np.array(values, dtype=dtype).reshape(-1, 1), device)
