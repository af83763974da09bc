"""Which weights become zero: those of the smallest magnitude. W [N, K]."""

from __future__ import annotations

import torch


def prune_mask(weight: torch.Tensor, sparsity: float, two_of_four: bool) -> torch.Tensor | None:
    """bool [N, K], True: becomes zero. two_of_four: two of each four inputs, which sparse matrix units take; else so
    many of each output. K must be a multiple of 4 for 2:4."""
    if two_of_four:
        fours = weight.abs().unflatten(1, (-1, 4))
        smallest = fours.argsort(dim=2, stable=True)[..., :2]
        return torch.zeros_like(fours, dtype=torch.bool).scatter_(2, smallest, True).flatten(1)
    count = round(sparsity * weight.shape[1])
    if count == 0:
        return None
    smallest = weight.abs().argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, smallest, True)
