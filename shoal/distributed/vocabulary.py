"""VocabularySlice: which run of the vocabulary is this rank's, and how ranks put together what each knows of its own.

Embedding, head and sampler hold one. R rows, V vocabulary, W width of a slice: all ranks' are of one width.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

from shoal.distributed.group import GroupCoordinator

# Slices begin at whole tiles of matrix kernels, and at whole words of a packed grammar mask.
_MULTIPLE = 64
Ids = TypeVar("Ids", torch.Tensor, np.ndarray)


class VocabularySlice:
    """Token ids start to start + width − 1. Those at and above V are padding: only num_tokens of them are tokens.

    Whatever is gathered is the same on all ranks afterwards, bit for bit. Nothing waits for a device. A rank alone has
    everything: there is no padding then, and nothing is copied.
    """

    def __init__(self, vocab_size: int, group: GroupCoordinator | None = None) -> None:
        num_ranks = 1 if group is None else group.world_size
        self.vocab_size = vocab_size
        self.group = group
        self.is_whole = num_ranks == 1
        self.width = vocab_size if self.is_whole else -(-vocab_size // (num_ranks * _MULTIPLE)) * _MULTIPLE
        self.start = 0 if group is None else group.rank_in_group * self.width
        self.num_tokens = max(0, min(self.width, vocab_size - self.start))

    @property
    def tokens(self) -> slice:
        """The ids of this rank's tokens; padding left out."""
        start = min(self.start, self.vocab_size)
        return slice(start, start + self.num_tokens)

    def holds(self, token_ids: Ids) -> Ids:
        """For each id whether it is one of this rank's tokens."""
        found: Ids = (token_ids >= self.start) & (token_ids < self.start + self.num_tokens)
        return found

    def gather(self, columns: torch.Tensor) -> torch.Tensor:
        """Every rank's columns [R, W] -> [R, V]."""
        if self.group is None or self.is_whole:
            return columns
        whole = self.group.all_gather(columns, dim=-1)
        return whole if whole.shape[-1] == self.vocab_size else whole[:, : self.vocab_size].contiguous()

    def greatest(self, values: torch.Tensor) -> torch.Tensor:
        """The greatest of all ranks' values, each [R]."""
        if self.group is None or self.is_whole:
            return values
        return self.group.all_gather(values.unsqueeze(0), dim=0).amax(dim=0)

    def best(self, values: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Of each rank's best token, with its value: the one with the greatest value, of equal ones the lowest rank's.

        values fp32 [R], token_ids int64 [R] -> int64 [R]. NaN counts as greatest, as argmax has it.
        """
        if self.group is None or self.is_whole:
            return token_ids
        mine = torch.stack([values.view(torch.int32), token_ids.to(torch.int32)])
        everyone = self.group.all_gather(mine.unsqueeze(0), dim=0)
        winners = everyone[:, 0].view(torch.float32).argmax(dim=0, keepdim=True)
        return everyone[:, 1].gather(0, winners).squeeze(0).to(torch.int64)
