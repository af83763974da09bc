"""Activation functions by the name in config.json. T tokens, F width of the MLP."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from shoal.errors import ModelError
from shoal.kernels.support import has_kernels
from shoal.layers.context import BuildContext

Activation = Callable[[torch.Tensor], torch.Tensor]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
_SILU = ("silu", "swish")
# Elementwise kernels of PyTorch work in vectors and take what is left over one by one, with another exponential. Pieces
# of at most this many elements are not split over threads (gelu's limit; the others' is twice that), so what is left
# over is known.
_SERIAL_ELEMENTS = 16384
_VECTOR = 64


def activation(name: str, deterministic: bool = False) -> Activation:
    """The function called `name`; deterministic: a row's bits do not depend on the rows around it.

    Raises ModelError for an unknown name.
    """
    if name not in _ACTIVATIONS:
        raise ModelError(f"activation {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    return partial(by_rows, _ACTIVATIONS[name]) if deterministic else _ACTIVATIONS[name]


class GatedActivation:
    """function(gate) * up, for the MLPs that gate. Raises ModelError for an unknown name."""

    def __init__(self, context: BuildContext, name: str) -> None:
        self._function = activation(name, context.deterministic and context.device.type == "cpu")
        self.is_silu = name in _SILU
        self._kernel: Callable[[torch.Tensor], torch.Tensor] | None = None
        if self.is_silu and has_kernels(context.device):
            self._kernel = importlib.import_module("shoal.kernels.activation").silu_and_mul

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [T, 2 F], gate first -> [T, F]."""
        return gated(self._function, gate_up) if self._kernel is None else self._kernel(gate_up)


def gated(function: Activation, gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 F], gate first -> function(gate) * up, [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return function(gate).mul_(up)


def by_rows(function: Activation, x: torch.Tensor) -> torch.Tensor:
    """x [T, F] -> function(x), in pieces that every row meets in the same way: whole vectors, one thread."""
    num_rows, width = x.shape
    padded = F.pad(x, (0, -width % _VECTOR))  # a copy, contiguous
    step = min(padded.shape[1], _SERIAL_ELEMENTS // _VECTOR * _VECTOR)
    rows = max(1, _SERIAL_ELEMENTS // step)
    output = torch.empty_like(padded)
    for first in range(0, num_rows, rows):
        for column in range(0, padded.shape[1], step):
            piece = (slice(first, first + rows), slice(column, column + step))
            output[piece] = function(padded[piece])
    return output[:, :width]
