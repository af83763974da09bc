"""Whether the Triton kernels can run here: asked once, when a layer or backend is made. Each has a plain way too."""

from __future__ import annotations

import functools
import importlib.util

import torch

# bfloat16 matrix units and asynchronous copies: A100, L20, H100 and later.
_OLDEST = (8, 0)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether this device runs them: an NVIDIA GPU from sm_80 on, with Triton installed."""
    return device.type == "cuda" and has_triton() and torch.cuda.get_device_capability(device) >= _OLDEST
