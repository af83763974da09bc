"""Attention backends by name, imported when first asked for."""

from __future__ import annotations

import importlib

import torch

from shoal.attention.base import AttentionBackend
from shoal.errors import ConfigError
from shoal.kernels.support import has_kernels

_BACKENDS = {
    "reference": ("shoal.attention.reference", "ReferenceAttention"),
    "torch_paged": ("shoal.attention.torch_paged", "TorchPagedAttention"),
    "triton_paged": ("shoal.attention.triton_paged", "TritonPagedAttention"),
    "deterministic": ("shoal.attention.deterministic", "DeterministicAttention"),
    "deterministic_cuda": ("shoal.attention.deterministic_cuda", "DeterministicCudaAttention"),
}


def create_attention_backend(name: str) -> AttentionBackend:
    """The backend called `name`. Raises ConfigError for an unknown one."""
    if name not in _BACKENDS:
        raise ConfigError(f"attention backend {name!r} is unknown; there are: {', '.join(_BACKENDS)}")
    module, class_name = _BACKENDS[name]
    backend: AttentionBackend = getattr(importlib.import_module(module), class_name)()
    return backend


def make_backend(deterministic: bool, device: torch.device) -> AttentionBackend:
    """The backend for a device and mode. Raises ConfigError where there is none."""
    if not deterministic:
        return create_attention_backend("triton_paged" if has_kernels(device) else "torch_paged")
    if device.type == "cpu":
        return create_attention_backend("deterministic")
    if torch.cuda.is_available() and has_kernels(device):
        return create_attention_backend("deterministic_cuda")
    raise ConfigError(
        f"deterministic mode runs on CPU, not on {device.type} here: that takes Triton, a C compiler for it and an "
        "NVIDIA GPU of compute capability 8.0 or later; pass --device cpu or leave it off"
    )
