"""What may be sampled at all: biases, banned and allowed tokens, end tokens before min_tokens, grammar masks.

Called by the sampler. Shapes: R rows, V vocabulary, N (row, token) pairs, A rows with a list of allowed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.sampling.rows import put_rows, take_rows, upload

_NEVER = float("-inf")
_BITS_PER_WORD = 32


@dataclass(frozen=True, slots=True)
class Biases:
    """Values fp32 [N] to add at flat positions row * V + token id, int64 [N], no position twice."""

    flat_index: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class AllowedRows:
    """Rows that may sample only some tokens: `banned`, bool [A, V], is True for all others."""

    rows: Tensor | None
    banned: Tensor


def flat_index(pairs: list[tuple[int, list[int]]], vocab_size: int, device: torch.device) -> Tensor | None:
    """Flat positions, int64 [N], of (row, token ids) pairs; None where there are none. Ids outside the vocabulary
    (an end token above the model's padded head, say) cannot be sampled anyway and are left out."""
    parts = []
    for row, token_ids in pairs:
        ids = np.array(token_ids, dtype=np.int64)
        parts.append(ids[(ids >= 0) & (ids < vocab_size)] + row * vocab_size)
    if sum(part.size for part in parts) == 0:
        return None
    return upload(np.concatenate(parts), device)


def banned_row(allowed_token_ids: list[int], vocab_size: int, device: torch.device) -> Tensor:
    """bool [V]: True for every token that is not in the list."""
    banned: npt.NDArray[np.bool_] = np.ones(vocab_size, dtype=np.bool_)
    banned[allowed_token_ids] = False
    return upload(banned, device)


def apply_allowed(logits: Tensor, group: AllowedRows) -> None:
    put_rows(logits, group.rows, take_rows(logits, group.rows).masked_fill_(group.banned, _NEVER))


def apply_banned(logits: Tensor, index: Tensor) -> None:
    """index: from `flat_index`."""
    logits.view(-1).index_fill_(0, index, _NEVER)


def apply_biases(logits: Tensor, biases: Biases) -> None:
    logits.view(-1).index_add_(0, biases.flat_index, biases.values)


def apply_grammar_mask(logits: Tensor, mask: Tensor) -> None:
    """Ban what a grammar does not allow.

    mask: bool [R, V], True is allowed; or int32 [R, ceil(V / 32)], packed: bit i of word w stands for token 32 * w + i.
    A row without a grammar has every bit set.
    """
    num_rows, vocab_size = logits.shape
    if mask.dtype == torch.int32:
        num_words = -(-vocab_size // _BITS_PER_WORD)
        assert mask.shape == (num_rows, num_words), f"packed grammar mask {tuple(mask.shape)} for {tuple(logits.shape)}"
        bits = torch.arange(_BITS_PER_WORD, dtype=torch.int32, device=mask.device)
        mask = mask.unsqueeze(-1).bitwise_right_shift(bits).bitwise_and_(1).view(num_rows, -1)[:, :vocab_size].bool()
    assert mask.dtype == torch.bool and mask.shape == logits.shape, f"grammar mask {mask.dtype} {tuple(mask.shape)}"
    logits.masked_fill_(mask.logical_not(), _NEVER)
