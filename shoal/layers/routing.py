"""Which experts a token goes to, and with what weight. Called by layers/moe.py; a family may bring one of its own.

T tokens, E experts, k experts a token.
"""

from __future__ import annotations

import importlib
from typing import Protocol

import torch

from shoal.kernels.support import has_kernels


class Routing(Protocol):
    """logits [T, E] -> (weights fp32 [T, k], ids [T, k] of an integer type). Of equal scores the lowest id comes first.

    It must not wait for the host, and a row's result depends on that row alone: no operation whose bits change with the
    number of rows. It may be an nn.Module with weights of its own (`HoldsWeights`), such as a correction of the scores.
    """

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


class SoftmaxTopK:
    """The k highest logits, weighted by their share of the softmax over all experts (Shazeer et al. 2017).

    normalize: their weights sum to 1 instead, which is the softmax over the k alone. scale: times that.
    """

    def __init__(self, num_chosen: int, *, normalize: bool, scale: float = 1.0) -> None:
        self.num_chosen, self.normalize, self.scale = num_chosen, normalize, scale

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if has_kernels(logits.device):
            route = importlib.import_module("shoal.kernels.moe_routing").softmax_top_k
            found: tuple[torch.Tensor, torch.Tensor] = route(logits, self.num_chosen, self.normalize, self.scale)
            return found
        logits = logits.float()
        chosen, ids = top_k(logits, self.num_chosen)
        # softmax() of the whole row treats every row alike; of the chosen few it is written out below.
        weights = logits.softmax(dim=-1).gather(1, ids)
        if self.normalize:
            weights = weights / sum_chosen(weights)
        return (weights if self.scale == 1.0 else weights * self.scale), ids


def top_k(scores: torch.Tensor, num_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [T, E] -> the highest k, highest first, and their ids int64, both [T, k]; of equal ones the lowest id."""
    ordered, ids = scores.sort(dim=-1, descending=True, stable=True)
    return ordered[:, :num_chosen], ids[:, :num_chosen]


def sum_chosen(weights: torch.Tensor) -> torch.Tensor:
    """weights [T, k] -> [T, 1], added in the order of k: the same bits however many rows there are."""
    total = weights[:, :1]
    for index in range(1, weights.shape[1]):
        total = total + weights[:, index : index + 1]
    return total
