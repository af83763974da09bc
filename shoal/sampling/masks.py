"""What may be sampled at all: biases, banned and allowed tokens, end tokens before min_tokens, grammar masks.

Called by the sampler. Shapes: R rows, V vocabulary, W width of this rank's slice of it (alone: V), N (row, token)
pairs, A rows with a list of allowed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.distributed.vocabulary import VocabularySlice
from shoal.sampling.rows import put_rows, take_rows, upload

_NEVER = float("-inf")
_BITS_PER_WORD = 32


@dataclass(frozen=True, slots=True)
class Biases:
    """Values fp32 [N] to add at flat positions row * W + column, int64 [N], no position twice."""

    flat_index: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class AllowedRows:
    """Rows that may sample only some tokens: `banned`, bool [A, W], is True for all others."""

    rows: Tensor | None
    banned: Tensor


def flat_index(pairs: list[tuple[int, list[int]]], vocabulary: VocabularySlice, device: torch.device) -> Tensor | None:
    """Flat positions, int64 [N], of (row, token ids) pairs; None where there are none. Other ranks' ids are left out,
    and ids outside the vocabulary (an end token above the model's padded head, say): they cannot be sampled anyway."""
    parts = []
    for row, token_ids in pairs:
        ids = np.array(token_ids, dtype=np.int64)
        parts.append(ids[vocabulary.holds(ids)] + (row * vocabulary.width - vocabulary.start))
    if sum(part.size for part in parts) == 0:
        return None
    return upload(np.concatenate(parts), device)


def banned_row(allowed_token_ids: list[int], vocabulary: VocabularySlice, device: torch.device) -> Tensor:
    """bool [W]: True for every token of this rank that is not in the list."""
    banned: npt.NDArray[np.bool_] = np.ones(vocabulary.width, dtype=np.bool_)
    ids = np.array(allowed_token_ids, dtype=np.int64)
    banned[ids[vocabulary.holds(ids)] - vocabulary.start] = False
    return upload(banned, device)


def apply_allowed(logits: Tensor, group: AllowedRows) -> None:
    put_rows(logits, group.rows, take_rows(logits, group.rows).masked_fill_(group.banned, _NEVER))


def apply_banned(logits: Tensor, index: Tensor) -> None:
    """index: from `flat_index`."""
    logits.view(-1).index_fill_(0, index, _NEVER)


def apply_biases(logits: Tensor, biases: Biases) -> None:
    logits.view(-1).index_add_(0, biases.flat_index, biases.values)


def apply_grammar_mask(logits: Tensor, mask: Tensor, vocabulary: VocabularySlice) -> None:
    """Ban what a grammar does not allow, in logits [R, W].

    mask: bool [R, V], True is allowed; or int32 [R, ceil(V / 32)], packed: bit i of word w stands for token 32 * w + i.
    A row without a grammar has every bit set.
    """
    num_rows, vocab_size, tokens = logits.shape[0], vocabulary.vocab_size, vocabulary.tokens
    if mask.dtype == torch.int32:
        num_words = -(-vocab_size // _BITS_PER_WORD)
        assert mask.shape == (num_rows, num_words), f"packed grammar mask {tuple(mask.shape)} for {vocab_size} tokens"
        # A slice starts at a whole word.
        words = mask[:, tokens.start // _BITS_PER_WORD : -(-tokens.stop // _BITS_PER_WORD)]
        bits = torch.arange(_BITS_PER_WORD, dtype=torch.int32, device=mask.device)
        bools = words.unsqueeze(-1).bitwise_right_shift(bits).bitwise_and_(1).flatten(1)
        mask = bools[:, : vocabulary.num_tokens].bool()
    else:
        assert mask.shape == (num_rows, vocab_size), f"grammar mask {tuple(mask.shape)} for {vocab_size} tokens"
        mask = mask[:, tokens]
    assert mask.dtype == torch.bool, f"grammar mask {mask.dtype}"
    logits[:, : vocabulary.num_tokens].masked_fill_(mask.logical_not(), _NEVER)
