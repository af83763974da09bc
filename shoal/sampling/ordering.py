"""The best tokens of each row, highest first, ties to the lowest id, on every device. Called by draws and logprobs.

Shapes: R rows, V vocabulary, K candidates.

torch.topk leaves open which of two equal values it takes. Here each token gets a 64-bit key, the distance to the row's
best value above and the token id below, so that no two are equal: float32 values that are not negative are ordered as
the integers of their bits are.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ID_BITS = 24
MAX_VOCAB_SIZE = 2**_ID_BITS


def distances_to_best(values: Tensor) -> Tensor:
    """max(row) - value, fp32 [R, V]: 0 for the best, never negative (nor -0, which would sort last). A new tensor."""
    return torch.sub(values.amax(dim=-1, keepdim=True) + 0.0, values)


def ordering_keys(distances: Tensor) -> Tensor:
    """int64 [R, V]: ascending keys are descending values, and equal values are ordered by token id."""
    keys = distances.view(torch.int32).to(torch.int64)
    token_ids = torch.arange(distances.shape[-1], dtype=torch.int64, device=distances.device)
    return keys.bitwise_left_shift_(_ID_BITS).bitwise_or_(token_ids)


def best_candidates(keys: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Token ids int64 [R, K] and distances fp32 [R, K] of the K best, best first. keys from `ordering_keys`."""
    if num_candidates < keys.shape[-1]:
        best = keys.topk(num_candidates, dim=-1, largest=False, sorted=True).values
    else:
        best = keys.sort(dim=-1).values
    token_ids = best.bitwise_and(MAX_VOCAB_SIZE - 1)
    distances = best.bitwise_right_shift_(_ID_BITS).to(torch.int32).view(torch.float32)
    return token_ids, distances
