"""Attention backends by name, imported when first asked for."""

from __future__ import annotations

import importlib

import torch

from shoal.attention.base import AttentionBackend
from shoal.errors import ConfigError

_BACKENDS = {
    "reference": ("shoal.attention.reference", "ReferenceAttention"),
    "torch_paged": ("shoal.attention.torch_paged", "TorchPagedAttention"),
    "deterministic": ("shoal.attention.deterministic", "DeterministicAttention"),
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
        return create_attention_backend("torch_paged")
    if device.type != "cpu":
        raise ConfigError(f"deterministic mode runs on CPU, not on {device.type}; pass --device cpu or leave it off")
    return create_attention_backend("deterministic")
