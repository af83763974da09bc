"""AWQ (Lin et al. 2023, arXiv:2306.00978): inputs with large activations get a finer grid.

Input k of the matrices that read one tensor is multiplied by s[k], and what makes the tensor is divided by it: a norm's
weight, or a matrix whose outputs reach this one unchanged but for factors (up before down, value before output). s is
magnitude^ratio, with the ratio that changes the outputs least. W [N, K].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from shoal.quantize.calibration import Inputs
from shoal.quantize.grid import round_to_nearest

_NUM_RATIOS = 20
# Outputs of the layer may change so much by a fold that is exact but for rounding in fp32.
_EXACT = 1e-4


def find_scales(
    inputs: Inputs, weights: list[torch.Tensor], masks: list[torch.Tensor | None], group_size: int, symmetric: bool
) -> torch.Tensor:
    """fp32 [K]: for the matrices that read these inputs; ones where nothing is better."""
    best, lowest = torch.ones_like(inputs.magnitude), float("inf")
    magnitude = inputs.magnitude / max(1, inputs.num_tokens)
    for step in range(_NUM_RATIOS):
        scales = magnitude.clamp(min=1e-4) ** (step / _NUM_RATIOS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = 0.0
        for weight, mask in zip(weights, masks, strict=True):
            rounded = round_to_nearest(weight * scales, 4, group_size, symmetric, mask).values() / scales
            change = rounded - weight
            error += float((change @ inputs.hessian).mul_(change).sum())
        if error < lowest:
            best, lowest = scales, error
    return best


def fold(
    layer: nn.Module,
    linears: dict[str, nn.Linear],
    inputs: Inputs,
    scales: torch.Tensor,
    run: Callable[[], torch.Tensor],
) -> bool:
    """Multiply the matrices' inputs by `scales`, and divide them before, where `run` (one sample through the layer)
    shows that this leaves the layer's outputs alone. False: there is no such place, nothing is changed."""
    expected = run()
    matrices = [linears[name] for name in inputs.names]
    kept = [matrix.weight.data for matrix in matrices]
    for change, undo in _places(layer, linears, inputs, scales):
        change()
        for matrix, weight in zip(matrices, kept, strict=True):
            matrix.weight.data = weight * scales
        difference = (run() - expected).norm() / expected.norm()
        if bool(difference < _EXACT):
            return True
        undo()
        for matrix, weight in zip(matrices, kept, strict=True):
            matrix.weight.data = weight
    return False


def _places(
    layer: nn.Module, linears: dict[str, nn.Linear], inputs: Inputs, scales: torch.Tensor
) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """What could be divided by `scales`: (do, undo)."""
    size = len(scales)
    before = layer.get_submodule(inputs.before) if inputs.before is not None else None
    if before is not None:
        weight = getattr(before, "weight", None)
        if weight is not None and len(weight) == size:
            yield _division(before, slice(0, size), scales)
            if weight.dim() == 1:
                yield _division(before, slice(0, size), scales, plus=1.0)  # norms that multiply by 1 + weight
        return
    for name, module in linears.items():
        if name not in inputs.names and module.out_features % size == 0:
            for start in range(0, module.out_features, size):
                yield _division(module, slice(start, start + size), scales)


def _division(
    module: nn.Module, rows: slice, scales: torch.Tensor, plus: float = 0.0
) -> tuple[Callable[[], None], Callable[[], None]]:
    found = [(module.weight, plus), (getattr(module, "bias", None), 0.0)]
    tensors = [(tensor, more, tensor.data.clone()) for tensor, more in found if tensor is not None]

    def do() -> None:
        for tensor, more, old in tensors:
            new = old.clone()
            new[rows] = (old[rows] + more) / (scales if old.dim() == 1 else scales[:, None]) - more
            tensor.data = new

    def undo() -> None:
        for tensor, _, old in tensors:
            tensor.data = old

    return do, undo
