"""Tokens of rows that are greedy or drawn from the whole vocabulary, all in one go: what a captured step ends with.

R rows, W width of this rank's slice of the vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from shoal.distributed.vocabulary import VocabularySlice
from shoal.kernels.support import has_kernels
from shoal.sampling.random import negative_exponentials, token_hashes


class TokenChoice:
    """The kernel on a GPU that has it, else PyTorch's own operations. Nothing waits for the device."""

    def __init__(self, vocabulary: VocabularySlice, device: torch.device) -> None:
        self._vocabulary = vocabulary
        self._kernel: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
        if has_kernels(device):
            self._kernel = importlib.import_module("shoal.kernels.sampling").choose_tokens
        else:
            self._hashed_ids = token_hashes(vocabulary.start + vocabulary.width, device)[vocabulary.start :]

    def __call__(
        self, logits: torch.Tensor, temperatures: torch.Tensor, min_ps: torch.Tensor, row_keys: torch.Tensor
    ) -> torch.Tensor:
        """logits [R, W], as the head projects them; temperatures (0: greedy), min_ps fp32 [R]; row_keys int32 [R].

        Returns token ids int64 [R], the same on all ranks.
        """
        vocabulary = self._vocabulary
        if self._kernel is None:
            return self._choose_plainly(logits.float(), temperatures, min_ps, row_keys)
        values, token_ids = self._kernel(
            logits, temperatures, min_ps, row_keys, vocabulary.start, vocabulary.num_tokens
        )
        return vocabulary.best(values, token_ids)

    def _choose_plainly(
        self, logits: torch.Tensor, temperatures: torch.Tensor, min_ps: torch.Tensor, row_keys: torch.Tensor
    ) -> torch.Tensor:
        vocabulary = self._vocabulary
        columns = torch.arange(vocabulary.width, device=logits.device)
        logits = logits.masked_fill(columns >= vocabulary.num_tokens, float("-inf"))
        greedy = temperatures == 0
        scaled = logits / torch.where(greedy, 1.0, temperatures).unsqueeze(1)
        best = vocabulary.greatest(scaled.amax(dim=-1)).unsqueeze(1)
        weights = (scaled - best).exp()
        weights = weights.masked_fill(weights < min_ps.unsqueeze(1), 0.0)
        speeds = -(weights / negative_exponentials(row_keys, self._hashed_ids))
        values = torch.where(greedy.unsqueeze(1), logits, speeds)
        chosen = values.argmax(dim=-1, keepdim=True)
        return vocabulary.best(values.gather(1, chosen).squeeze(1), chosen.squeeze(1) + vocabulary.start)
