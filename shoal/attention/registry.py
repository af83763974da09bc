"""Attention backends by name, imported when first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TypeVar

import torch

from shoal.attention.base import AttentionBackend, AttentionRefusal
from shoal.errors import ConfigError
from shoal.kernels.support import has_kernels
from shoal.log import get_logger

_logger = get_logger(__name__)
Built = TypeVar("Built")

_BACKENDS = {
    "bidirectional": ("shoal.attention.bidirectional", "BidirectionalAttention"),
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


def backend_names(deterministic: bool, device: torch.device) -> tuple[str, ...]:
    """Those that are right for a device and mode, the fastest first. Raises ConfigError where there is none."""
    if not deterministic:
        return ("triton_paged", "torch_paged") if has_kernels(device) else ("torch_paged",)
    if device.type == "cpu":
        return ("deterministic",)
    if torch.cuda.is_available() and has_kernels(device):
        return ("deterministic_cuda",)
    raise ConfigError(
        f"deterministic mode runs on CPU, not on {device.type} here: that takes Triton, a C compiler for it and an "
        "NVIDIA GPU of compute capability 8.0 or later; pass --device cpu or leave it off"
    )


def make_backend(deterministic: bool, device: torch.device) -> AttentionBackend:
    """The one for a device and mode, for layers that ask nothing special. Raises ConfigError where there is none."""
    return create_attention_backend(backend_names(deterministic, device)[0])


def build_with_backend(deterministic: bool, device: torch.device, build: Callable[[AttentionBackend], Built]) -> Built:
    """What `build` makes with the fastest backend that none of its layers is refused by. Raises ConfigError."""
    *others, last = backend_names(deterministic, device)
    for name in others:
        try:
            return build(create_attention_backend(name))
        except AttentionRefusal as refusal:
            _logger.warning("%s; the next backend is tried", refusal)
    try:
        return build(create_attention_backend(last))
    except AttentionRefusal as refusal:
        way_out = "; leave deterministic mode off (--no-deterministic)" if deterministic else ""
        raise ConfigError(f"{refusal}, and there is no other that does{way_out}") from None
