"""The least kernel there is: whether it runs says whether any does. Called by kernels/support.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _probe_kernel(x):
    tl.store(x, 1)


def launch(device: str = "cuda") -> None:
    """Compile it, run it and wait for it. Raises whatever Triton, its compilers and the driver raise."""
    x = torch.zeros(1, dtype=torch.int32, device=device)
    _probe_kernel[(1,)](x)
    if x.item() != 1:
        raise RuntimeError("a kernel was launched, and its result is not there")
