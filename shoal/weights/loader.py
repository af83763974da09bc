"""Fills a model from a checkpoint, or with random values. Called by the worker, which built the model.

It knows models only by what they tell: `weight_holders`, `tensor_name` and `expects_elsewhere`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol

import torch

from shoal.config.model_config import ModelConfig
from shoal.errors import ModelError
from shoal.layers.checkpoint import CheckpointTensor, HoldsWeights
from shoal.weights.dummy import fill_random
from shoal.weights.files import TensorFile, open_weights

# Older names of what a cache of 8-bit floats is multiplied by: makers put it below the projections.
_CACHE_SCALES = {
    f".{part}_proj.{suffix}": f".{part}_scale" for part in "kv" for suffix in (f"{part}_scale", "output_scale")
}

# (bytes done, bytes in all)
Progress = Callable[[int, int], None]


class Loadable(Protocol):
    """What the loader needs of a model."""

    def weight_holders(self) -> Iterator[HoldsWeights]: ...

    def tensor_name(self, stored: str) -> str: ...

    def expects_elsewhere(self, name: str) -> bool: ...


def load_weights(
    model: Loadable,
    model_config: ModelConfig,
    load_format: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> int:
    """Fill every tensor of `model`, convert to its dtype, and let each layer pack. Returns the bytes read from files.

    A rank reads its pieces only, and never holds more than its weights and one layer's twice.
    load_format: "auto" safetensors; "pt" .bin files as well; "dummy" random values from `seed`, no file is read.
    Raises ModelError naming the file or tensor that is missing, unexpected or of the wrong shape.
    """
    num_bytes = 0
    with torch.inference_mode():
        layers = _Layers(model, progress)
        if load_format == "dummy":
            for name in layers.names:
                layers.fill(name, lambda tensor: fill_random(tensor, seed))
        else:
            if layers.has_optional:
                layers.drop_absent(
                    name for file in open_weights(model_config.path, load_format) for name in file.names()
                )
            for file in open_weights(model_config.path, load_format):
                _load_file(file, model, layers, model_config.path)
                num_bytes += file.num_bytes_read
        layers.finish(model_config.path)
    return num_bytes


class _Layers:
    """The layers of a model that wait for tensors. Each packs as soon as it has its own: nothing here holds on to what
    it then frees. Layers that use another layer's tensors come last."""

    def __init__(self, model: Loadable, progress: Progress | None) -> None:
        self._tensor_name = model.tensor_name
        # By name in the checkpoint: all that take a piece of that tensor.
        self._waiting: dict[str, list[tuple[CheckpointTensor, HoldsWeights]]] = {}
        self._num_missing: dict[HoldsWeights, int] = {}
        for layer in model.weight_holders():
            self._num_missing[layer] = 0
            for tensor in layer.checkpoint_tensors():
                self._waiting.setdefault(tensor.name, []).append((tensor, layer))
                self._num_missing[layer] += 1
        self._progress = progress
        self._num_bytes_done = 0
        self._num_bytes = sum(tensor.destination.nbytes for takers in self._waiting.values() for tensor, _ in takers)
        self.names = tuple(self._waiting)
        self._known = frozenset(self.names)

    @property
    def has_optional(self) -> bool:
        return any(tensor.optional for takers in self._waiting.values() for tensor, _ in takers)

    def drop_absent(self, stored: Iterable[str]) -> None:
        """Do not wait for optional tensors that are not among those that are stored."""
        present = {self.canonical(name) for name in stored}
        for name, takers in list(self._waiting.items()):
            if name not in present and all(tensor.optional for tensor, _ in takers):
                for tensor, layer in self._waiting.pop(name):
                    self._num_missing[layer] -= 1
                    self._num_bytes -= tensor.destination.nbytes
        self.names = tuple(self._waiting)

    def canonical(self, stored: str) -> str:
        """As the layers call it. Checkpoints of the bare decoder (without a head) lack the leading "model."."""
        name = self._tensor_name(stored)
        for old, new in _CACHE_SCALES.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        return f"model.{name}" if name not in self._known and f"model.{name}" in self._known else name

    def knows(self, name: str) -> bool:
        return name in self._known

    def awaits(self, name: str) -> bool:
        return name in self._waiting

    def fill(self, name: str, fill: Callable[[CheckpointTensor], None]) -> None:
        """fill(tensor) for all that take a piece of the tensor of that name."""
        takers = self._waiting.pop(name)
        while takers:
            tensor, layer = takers.pop()
            fill(tensor)
            self._num_bytes_done += tensor.destination.nbytes
            del tensor
            self._num_missing[layer] -= 1
            if not self._num_missing[layer]:
                del self._num_missing[layer]
                layer.process_after_load()
        if self._progress is not None:
            self._progress(self._num_bytes_done, self._num_bytes)

    def finish(self, path: str) -> None:
        """Raise ModelError if a layer still waits."""
        if self._waiting:
            raise ModelError(
                f"{path}: {len(self._waiting)} of {len(self.names)} tensors are missing from the weights, the first is "
                f"{min(self._waiting)}"
            )
        for layer in self._num_missing:
            layer.process_after_load()


def _load_file(file: TensorFile, model: Loadable, layers: _Layers, path: str) -> None:
    for stored_name in file.names():
        name = layers.canonical(stored_name)
        if layers.awaits(name):
            layers.fill(name, partial(_load_tensor, file, stored_name, path))
        elif layers.knows(name):
            raise ModelError(f"{path}: tensor {name} is stored twice")
        elif not model.expects_elsewhere(name):
            raise ModelError(
                f"{path}: unexpected tensor {stored_name}: the config does not describe these weights "
                "(another architecture, more layers, biases, or a quantized checkpoint)"
            )


def _load_tensor(file: TensorFile, stored_name: str, path: str, tensor: CheckpointTensor) -> None:
    shape, index, destination = file.shape(stored_name), tensor.index, tensor.destination
    if shape != tensor.shape and _without_ones(shape) == _without_ones(tensor.shape):
        # A scale for each output may be [N] or [N, 1], one for all [] or [1].
        parts = iter(part for part, size in zip(index, tensor.shape, strict=True) if size != 1)
        index = tuple(slice(0, 1) if size == 1 else next(parts) for size in shape)
        destination = destination.view([part.stop - part.start for part in index])
    elif shape != tensor.shape:
        raise ModelError(
            f"{path}: tensor {stored_name} has shape {list(shape)}, the config asks for {list(tensor.shape)}"
        )
    stored, wanted = file.dtype(stored_name), tensor.destination.dtype
    if _is_plain(wanted):
        if not _is_plain(stored):
            raise ModelError(
                f"{path}: tensor {stored_name} is {str(stored).removeprefix('torch.')}; the config describes plain "
                "floating-point weights"
            )
    elif stored != wanted and (stored, wanted) != (torch.int32, torch.int64):  # sizes: makers write either
        raise ModelError(
            f"{path}: tensor {stored_name} is {str(stored).removeprefix('torch.')}, the config asks for "
            f"{str(wanted).removeprefix('torch.')}"
        )
    file.read_into(stored_name, index, destination)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _is_plain(dtype: torch.dtype) -> bool:
    """Whether numbers of this type are what they seem: floats of 16 bits or more."""
    return dtype.is_floating_point and dtype.itemsize > 1
