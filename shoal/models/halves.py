"""A step of many tokens on several ranks, computed in two halves: while the ranks sum one, they compute the other."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shoal.attention.base import AttentionMetadata
from shoal.distributed.communicator import PendingSum
from shoal.distributed.group import GroupCoordinator
from shoal.layers.norm import RMSNorm
from shoal.layers.rotary import Angles, RotaryEmbedding


class Half:
    """The first tokens of a step or the others, on their way through the layers: their residual stream [T, H], and what
    is still to be added to it.

    Where the sums over the ranks take the norm with them, each rank keeps the stream of its own rows alone.
    """

    def __init__(
        self,
        stream: torch.Tensor,
        group: GroupCoordinator,
        metadata: AttentionMetadata,
        angles: Mapping[RotaryEmbedding, Angles],
    ) -> None:
        self.metadata, self.angles = metadata, angles
        self._group = group
        self._pending = PendingSum(stream)
        self._residual: torch.Tensor | None = None
        self._own: torch.Tensor | None = None
        # Whether the pending sum has the stream in it, and has been normalised for whoever takes it.
        self._is_whole = False

    def start_sum(self, summand: torch.Tensor, norm: RMSNorm | None) -> None:
        """summand [T, H] of this rank, to be added to the stream. norm: what takes it next; None: `take_stream`."""
        assert self._residual is not None or self._own is not None, "the stream is taken before anything is added to it"
        rows = self._group.rows_of_stream(summand)
        if rows is None or (norm is not None and norm.weight.dtype is not summand.dtype):
            assert self._residual is not None, "all sums of a half go the same way"
            self._pending, self._is_whole = self._group.start_all_reduce(summand), False
            return
        if self._own is None:
            assert self._residual is not None
            self._own, self._residual = self._residual[rows].clone(), None
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        self._pending, self._is_whole = self._group.start_all_reduce_add_norm(summand, self._own, weight, eps), True

    def take(self, norm: RMSNorm) -> torch.Tensor:
        """The stream [T, H] with the last sum in it, normalised. To be used before the next but one sum begins."""
        hidden = self._pending.wait()
        if self._is_whole:
            return hidden
        hidden, self._residual = norm.add_and_norm(hidden, self._residual, is_summed=True)
        return hidden

    def take_stream(self) -> torch.Tensor:
        """The stream [T, H] with the last sum in it, where no norm takes it."""
        hidden = self._pending.wait()
        return hidden if self._is_whole or self._residual is None else hidden + self._residual
