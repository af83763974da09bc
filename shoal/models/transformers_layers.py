"""Modules of ours in a Transformers model: around our layers, around what is left of its own.

T tokens, R rows, H hidden size, W width of this rank's slice of the vocabulary; activations are [1, T, …] there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shoal.layers.activation import by_rows
from shoal.layers.checkpoint import CheckpointTensor, TensorKind, whole
from shoal.layers.context import BuildContext
from shoal.layers.embedding import LogitsHead, VocabularyEmbedding
from shoal.layers.linear import Linear
from shoal.layers.norm import RMSNorm

_NORM_TOLERANCE = 1e-5


class Projection(nn.Module):
    """One of our linear layers, for activations [1, T, …]. own: the part of the inputs that is this rank's, taken where
    all are given. gathers: all ranks' outputs are put together."""

    def __init__(self, linear: Linear, context: BuildContext, *, own: slice | None = None, gathers: bool = False):
        super().__init__()
        self.linear = linear
        self.in_features = linear.in_features
        self._own = own if own is not None and own.stop - own.start < linear.in_features else None
        self._group = context.tensor_group if gathers and context.tensor_group.world_size > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self._own is not None and rows.shape[1] == self.in_features:
            rows = rows[:, self._own]
        rows = self.linear(rows.contiguous())
        if self._group is not None:
            rows = self._group.all_gather(rows)
        return rows.view(*x.shape[:-1], rows.shape[1])


class Merged(nn.Module):
    """One product for several projections that take the same input, one after the other, as in
    `act(gate(x)) * up(x)`: the first computes all, the others take theirs. One that brings another input computes
    again."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = linear
        self._sizes = [part.rows.stop - part.rows.start for part in linear.parts]
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    def take(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """x [1, T, …] -> [T, outputs of part `index`]."""
        if x is not self._input or index not in self._outputs:
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            self._outputs = dict(enumerate(self.linear(rows).split(self._sizes, dim=-1)))
            self._input = x
        output = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return output


class MergedPart(nn.Module):
    """One of the projections of a Merged, in the place of the model's own. gathers: as Projection's."""

    def __init__(self, merged: Merged, index: int, context: BuildContext, *, gathers: bool) -> None:
        super().__init__()
        self.merged, self._index = merged, index
        self.in_features = merged.linear.in_features
        self._group = context.tensor_group if gathers and context.tensor_group.world_size > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.merged.take(self._index, x)
        if self._group is not None:
            rows = self._group.all_gather(rows.contiguous())
        return rows.view(*x.shape[:-1], rows.shape[1])


class TokenEmbedding(nn.Module):
    """Our embedding, for ids [1, T] -> [1, T, H]."""

    def __init__(self, embedding: VocabularyEmbedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids.flatten()).unsqueeze(0)


class Head(nn.Module):
    """Our vocabulary projection, for [1, R, H] -> this rank's [1, R, W] in the model's dtype; some add a bias."""

    def __init__(self, context: BuildContext, head: LogitsHead, bias: str | None) -> None:
        """bias: its name in the checkpoint."""
        super().__init__()
        self.head, self._bias_name = head, bias
        self.bias: torch.Tensor | None = None
        if bias is not None:
            self.bias = torch.zeros(head.vocabulary.width, dtype=context.dtype, device=context.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.head.project(x[0])
        return (logits if self.bias is None else logits + self.bias).unsqueeze(0)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        if self.bias is not None and self._bias_name is not None:
            vocabulary = self.head.vocabulary
            yield CheckpointTensor(
                name=self._bias_name,
                shape=(vocabulary.vocab_size,),
                index=(vocabulary.tokens,),
                destination=self.bias[: vocabulary.num_tokens],
                kind="bias",
            )

    def process_after_load(self) -> None:
        return None

    def weight_bytes(self) -> int:
        return 0 if self.bias is None else self.bias.nbytes


class ModuleWeights:
    """The tensors of a module that stays as it is, whole on every rank: parameters in the model's dtype, buffers in
    their own. A buffer that the checkpoint lacks keeps what the model's code gave it, unless `needs_buffers`."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        context: BuildContext,
        keeps_fp32: Callable[[str], bool],
        stored: Collection[str],
        *,
        needs_buffers: bool = False,
    ) -> None:
        """stored: names of all that a checkpoint may have, in which buffers need not be."""
        self._tensors: list[CheckpointTensor] = []
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}" if name else key
            dtype = torch.float32 if keeps_fp32(full) else context.dtype
            data = torch.empty(parameter.shape, dtype=dtype, device=context.device)
            setattr(module, key, nn.Parameter(data, requires_grad=False))
            self._tensors.append(whole(full, data, _kind(module, key)))
        for key, buffer in module.named_buffers(recurse=False):
            full = f"{name}.{key}" if name else key
            data = buffer.to(context.device)
            module._buffers[key] = data
            if full in stored:
                found = dataclasses.replace(whole(full, data, "bias"), fill=lambda tensor, generator: None)
                self._tensors.append(dataclasses.replace(found, optional=not needs_buffers))

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        yield from self._tensors

    def process_after_load(self) -> None:
        return None

    def weight_bytes(self) -> int:
        return sum(tensor.destination.nbytes for tensor in self._tensors)


def _kind(module: nn.Module, key: str) -> TensorKind:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if key.endswith("bias"):
        return "bias"
    return "norm" if "norm" in type(module).__name__.lower() else "matrix"


class PositionTable(nn.Module):
    """A rotary embedding that looks up what the model's own gives for each position: the same numbers, whatever the
    step, and without computing them again."""

    def __init__(self, module: nn.Module, num_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._module, self._num_positions, self._dtype, self._device = [module], num_positions, dtype, device
        self._tables: dict[tuple[Any, ...], tuple[torch.Tensor, ...]] = {}
        if hasattr(module, "config"):  # that some models look at
            self.config = module.config

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, *more: Any, **named: Any
    ) -> tuple[torch.Tensor, ...]:
        key = (*more, *named.items())
        if key not in self._tables:
            self._tables[key] = self._make(more, named)
        positions = position_ids[0]
        return tuple(table.index_select(0, positions).unsqueeze(0) for table in self._tables[key])

    def _make(self, more: tuple[Any, ...], named: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        example = torch.empty((1, 1), dtype=self._dtype, device=self._device)
        positions = torch.arange(self._num_positions, device=self._device).unsqueeze(0)
        return tuple(table[0].contiguous() for table in self._module[0](example, positions, *more, **named))


class RowWise(nn.Module):
    """An activation function that treats each row alike whatever rows are beside it (deterministic mode on a CPU)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return by_rows(self.module, x.reshape(-1, x.shape[-1])).view(x.shape)


def plain_norm(name: str, module: nn.Module, context: BuildContext) -> RMSNorm | None:
    """Our RMSNorm for a module that computes the same, which is tried on random numbers; None for any other."""
    weights = dict(module.named_parameters())
    eps = next((value for key in ("variance_epsilon", "eps") if (value := getattr(module, key, None))), None)
    if "RMSNorm" not in type(module).__name__ or list(weights) != ["weight"] or not isinstance(eps, float):
        return None
    if weights["weight"].dim() != 1 or list(module.children()) or list(module.buffers()):
        return None
    size = weights["weight"].shape[0]
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 4, size, generator=generator), torch.randn(size, generator=generator)
    try:
        found = torch.func.functional_call(module, {"weight": weight}, (x,))
    except (RuntimeError, TypeError):
        return None
    expected = F.rms_norm(x, (size,), weight, eps)
    same = found.shape == expected.shape and torch.allclose(found, expected, atol=_NORM_TOLERANCE, rtol=0)
    return RMSNorm(context, name, size, eps) if same else None
