"""CheckpointTensor: where a tensor stands in a checkpoint, which piece is this rank's, and where it goes.

Layers yield them, the loader in weights/ fills them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal, Protocol, runtime_checkable

import torch

from shoal.quantization.base import Fill

TensorKind = Literal["matrix", "embedding", "norm", "bias"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointTensor:
    """name, shape: as in the checkpoint, whole. index: this rank's piece. destination: a view with the piece's shape.

    Several may have one name: each takes its piece of that tensor. Where the destination holds floats, the checkpoint
    may have others, which are converted; integers and 8-bit floats are taken as they are stored.
    optional: the checkpoint may lack it. kind tells the dummy loader what values make sense; `fill` makes them.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[slice, ...]
    destination: torch.Tensor
    kind: TensorKind
    optional: bool = False
    fill: Fill | None = None

    @property
    def is_whole(self) -> bool:
        return all(part.indices(size) == (0, size, 1) for part, size in zip(self.index, self.shape, strict=True))


@runtime_checkable
class HoldsWeights(Protocol):
    """A layer with weights: tensors of its own, or another layer's. `process_after_load` packs them and frees what
    loading needed; it is called once, when the tensors are filled (for another layer's: when all are)."""

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]: ...

    def process_after_load(self) -> None: ...

    def weight_bytes(self) -> int: ...


def whole(name: str, destination: torch.Tensor, kind: TensorKind) -> CheckpointTensor:
    """A tensor that every rank reads entirely."""
    shape = tuple(destination.shape)
    return CheckpointTensor(
        name=name, shape=shape, index=tuple(slice(0, size) for size in shape), destination=destination, kind=kind
    )
