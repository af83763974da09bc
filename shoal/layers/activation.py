"""Activation functions by the name in config.json. T tokens, F width of the MLP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from shoal.errors import ModelError

Activation = Callable[[torch.Tensor], torch.Tensor]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


def activation(name: str) -> Activation:
    """The function called `name`. Raises ModelError for an unknown one."""
    if name not in _ACTIVATIONS:
        raise ModelError(f"activation {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def gated(function: Activation, gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 F], gate first -> function(gate) * up, [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return function(gate).mul_(up)
