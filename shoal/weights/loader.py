"""Fills a model from a checkpoint, or with random values. Called by the worker, which built the model.

It knows models only by what they tell: `checkpoint_tensors`, `expects_elsewhere`, `process_after_load`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from shoal.config.model_config import ModelConfig
from shoal.errors import ModelError
from shoal.layers.checkpoint import CheckpointTensor
from shoal.weights.dummy import fill_random
from shoal.weights.files import TensorFile, open_weights

# (bytes done, bytes in all)
Progress = Callable[[int, int], None]


class Loadable(Protocol):
    """What the loader needs of a model."""

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]: ...

    def expects_elsewhere(self, name: str) -> bool: ...

    def process_after_load(self) -> None: ...


def load_weights(
    model: Loadable,
    model_config: ModelConfig,
    load_format: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Fill every tensor of `model`, convert to its dtype, then let it pack.

    load_format: "auto" safetensors; "pt" .bin files as well; "dummy" random values from `seed`, no file is read.
    Raises ModelError naming the file or tensor that is missing, unexpected or of the wrong shape.
    """
    wanted = {tensor.name: tensor for tensor in model.checkpoint_tensors()}
    counter = _Counter(sum(tensor.destination.nbytes for tensor in wanted.values()), progress)
    with torch.inference_mode():
        if load_format == "dummy":
            for tensor in wanted.values():
                fill_random(tensor, seed)
                counter.add(tensor.destination.nbytes)
        else:
            _load_files(model, wanted, model_config.path, load_format, counter)
        model.process_after_load()


class _Counter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _load_files(
    model: Loadable, wanted: dict[str, CheckpointTensor], path: str, load_format: str, counter: _Counter
) -> None:
    missing = dict(wanted)
    for file in open_weights(path, load_format):
        for stored_name in sorted(file.names()):
            name = _canonical(stored_name, wanted)
            tensor = missing.pop(name, None)
            if tensor is not None:
                _load_tensor(file, stored_name, tensor, path)
                counter.add(tensor.destination.nbytes)
            elif name in wanted:
                raise ModelError(f"{path}: tensor {name} is stored twice")
            elif not model.expects_elsewhere(name):
                raise ModelError(
                    f"{path}: unexpected tensor {stored_name}: the config does not describe these weights "
                    "(another architecture, more layers, biases, or a quantized checkpoint)"
                )
    if missing:
        names = sorted(missing)
        raise ModelError(
            f"{path}: {len(names)} of {len(wanted)} tensors are missing from the weights, the first is {names[0]}"
        )


def _canonical(name: str, wanted: dict[str, CheckpointTensor]) -> str:
    """Checkpoints of the bare decoder (without a head) lack the leading "model."."""
    return f"model.{name}" if name not in wanted and f"model.{name}" in wanted else name


def _load_tensor(file: TensorFile, stored_name: str, tensor: CheckpointTensor, path: str) -> None:
    shape = file.shape(stored_name)
    if shape != tensor.shape:
        raise ModelError(
            f"{path}: tensor {stored_name} has shape {list(shape)}, the config asks for {list(tensor.shape)}"
        )
    piece = file.read(stored_name, None if tensor.is_whole else tensor.index)
    if not piece.dtype.is_floating_point:
        raise ModelError(f"{path}: tensor {stored_name} is {piece.dtype}; expected floating-point weights")
    tensor.destination.copy_(piece)
