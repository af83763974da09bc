"""RMSNorm and LayerNorm, alone and joined with the residual sum before them. T tokens, H normalised size."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from shoal.distributed.group import GroupCoordinator
from shoal.kernels.support import has_kernels
from shoal.layers.checkpoint import CheckpointTensor, whole
from shoal.layers.context import BuildContext


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight (Zhang and Sennrich 2019). A row's result does not depend on other rows.

    sums_ranks: what it is given beside a residual stream is each rank's summand, of a RowLinear that leaves the sum.
    """

    def __init__(self, context: BuildContext, name: str, size: int, eps: float, *, sums_ranks: bool = False) -> None:
        super().__init__()
        self.name, self.eps = name, eps
        self.deterministic = context.deterministic
        self.dtype = context.dtype
        self.group = context.tensor_group if sums_ranks and context.tensor_group.world_size > 1 else None
        self.weight = torch.empty(size, dtype=context.dtype, device=context.device)
        self._shape = (size,)
        self._kernels = importlib.import_module("shoal.kernels.norm") if has_kernels(context.device) else None

    @property
    def weights(self) -> tuple[torch.Tensor, float]:
        """What a product that normalises what it takes needs to know."""
        return self.weight, self.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> the same shape."""
        if self._kernels is not None:
            return self._kernels.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self._shape, self.weight, self.eps)

    def add_and_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, *, is_summed: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream after adding x to it, normalised and as it is: (norm(x + residual), x + residual).

        Without a residual x [T, H] is the stream itself; else it is summed over the ranks first if `sums_ranks`, unless
        it is so already.
        """
        if residual is not None and self.group is not None and not is_summed:
            if not self.deterministic:
                return self.group.all_reduce_add_norm(x, residual, self.weight, self.eps, self._add_and_norm)
            x = sum_over_ranks(self.group, x, self.dtype, deterministic=True)
        return self._add_and_norm(x, residual)

    def _add_and_norm(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if self._kernels is not None:
            return self._kernels.add_rms_norm(x, residual, self.weight, self.eps)
        total = x if residual is None else x + residual
        return self.forward(total), total

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        yield whole(f"{self.name}.weight", self.weight, "norm")

    def process_after_load(self) -> None:
        return None

    def weight_bytes(self) -> int:
        return self.weight.nbytes


class OffsetRMSNorm(RMSNorm):
    """RMSNorm whose weight the checkpoint holds less 1 (Gemma). It stays in fp32: 1 + w in 16 bits would round w."""

    def __init__(self, context: BuildContext, name: str, size: int, eps: float, *, sums_ranks: bool = False) -> None:
        super().__init__(context, name, size, eps, sums_ranks=sums_ranks)
        self.weight = torch.empty(size, dtype=torch.float32, device=context.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._kernels is not None:
            return super().forward(x)
        return F.rms_norm(x.float(), self._shape, self.weight, self.eps).to(x.dtype)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        for tensor in super().checkpoint_tensors():
            yield dataclasses.replace(tensor, fill=lambda weight, _: weight.zero_())

    def process_after_load(self) -> None:
        self.weight.add_(1.0)


def sum_over_ranks(
    group: GroupCoordinator, summand: torch.Tensor, dtype: torch.dtype, *, deterministic: bool
) -> torch.Tensor:
    """summand [T, H] of every rank -> their sum in `dtype`; in deterministic mode as a branch of the fixed tree."""
    if deterministic:
        return group.all_reduce_tree(summand.unsqueeze(0)).to(dtype)
    return group.all_reduce(summand)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias; `affine` False has neither weight nor bias."""

    def __init__(self, context: BuildContext, name: str, size: int, eps: float, *, affine: bool = True) -> None:
        super().__init__()
        self.name, self.eps = name, eps
        self._shape = (size,)
        self.weight = torch.empty(size, dtype=context.dtype, device=context.device) if affine else None
        self.bias = torch.empty(size, dtype=context.dtype, device=context.device) if affine else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> the same shape."""
        return F.layer_norm(x, self._shape, self.weight, self.bias, self.eps)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        if self.weight is not None and self.bias is not None:
            yield whole(f"{self.name}.weight", self.weight, "norm")
            yield whole(f"{self.name}.bias", self.bias, "bias")

    def process_after_load(self) -> None:
        return None

    def weight_bytes(self) -> int:
        return 0 if self.weight is None or self.bias is None else self.weight.nbytes + self.bias.nbytes
