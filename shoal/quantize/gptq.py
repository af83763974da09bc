"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): round the inputs of a matrix one after the other, and let the inputs
that are still to come make up for what each rounding changes, as far as the calibration text tells.

W [N, K]. H [K, K] = XᵀX of the inputs X. With a mask of weights that become zero it prunes in the same way
(SparseGPT: Frantar and Alistarh 2023, arXiv:2301.00774).
"""

from __future__ import annotations

import torch

from shoal.errors import ModelError
from shoal.quantize.grid import Grid, IntegerWeight, find_grid

# Inputs whose changes are carried into the rest of the matrix at once.
_BLOCK = 128


def quantize_gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    desc_act: bool,
    damp: float,
    mask: torch.Tensor | None = None,
) -> IntegerWeight:
    """weight, hessian fp32; damp: what is added to the diagonal of H, as a share of its mean; mask bool [N, K].

    desc_act: inputs of large activations first, groups in that order. Raises ModelError where H has no inverse.
    """
    num_outputs, num_inputs = weight.shape
    size = group_size if group_size > 0 else num_inputs
    device = weight.device
    order = torch.arange(num_inputs, device=device)
    if desc_act:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    left = weight[:, order].clone()
    masked = mask[:, order] if mask is not None else None
    factor = _inverse_factor(hessian[order][:, order], damp)
    integers = torch.empty(num_outputs, num_inputs, dtype=torch.uint8, device=device)
    grids: list[Grid] = []
    for start in range(0, num_inputs, _BLOCK):
        stop = min(start + _BLOCK, num_inputs)
        errors = torch.zeros(num_outputs, stop - start, device=device)
        for index in range(start, stop):
            if index % size == 0:
                grids.append(_grid(left, masked, index, min(index + size, num_inputs), errors, factor, bits, symmetric))
            column = left[:, index]
            if masked is not None:
                column = column.masked_fill(masked[:, index], 0)
            integer = grids[-1].integers(column[:, None])
            integers[:, index] = integer[:, 0].to(torch.uint8)
            error = (left[:, index] - grids[-1].values(integer)[:, 0]) / factor[index, index]
            left[:, index + 1 : stop] -= error[:, None] * factor[index, index + 1 : stop]
            errors[:, index - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    back = torch.argsort(order)
    return IntegerWeight(
        integers=integers[:, back],
        scales=torch.stack([grid.scales for grid in grids]),
        zeros=torch.stack([grid.zeros for grid in grids]).to(torch.uint8),
        groups=back // size,
        bits=bits,
    )


def _grid(
    left: torch.Tensor,
    masked: torch.Tensor | None,
    start: int,
    stop: int,
    errors: torch.Tensor,
    factor: torch.Tensor,
    bits: int,
    symmetric: bool,
) -> Grid:
    """For the group of inputs `start` to `stop`, as they are now: those behind the block lack its changes so far."""
    group = left[:, start:stop]
    block_start = start // _BLOCK * _BLOCK
    block_stop = block_start + errors.shape[1]
    if stop > block_stop and start > block_start:
        group = group.clone()
        done = start - block_start
        group[:, block_stop - start :] -= errors[:, :done] @ factor[block_start:start, block_stop:stop]
    if masked is not None:
        group = group.masked_fill(masked[:, start:stop], 0)
    return find_grid(group, bits, symmetric)


def _inverse_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """The upper Cholesky factor of H⁻¹. Inputs that are always zero count as of no correlation."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal.mean()
    diagonal[dead] = 1 if mean == 0 else mean
    # More of it until the factors exist: few tokens leave H singular.
    for times in (1, 10, 100):
        damped = hessian.clone()
        damped.diagonal().add_(damp * times * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(failed) == 0 and bool(upper.isfinite().all()):
                return upper
    raise ModelError(
        f"the inputs of a matrix have no invertible Hessian even with a dampening of {100 * damp}; more calibration "
        "text (--num-samples, --sequence-length) or a larger --damp would work"
    )
