"""Tensors of a checkpoint by name, read one at a time, and files of them, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shoal.errors import ModelError
from shoal.quantize.source import SourceCheckpoint


class TensorReader:
    """Those of the plain checkpoint."""

    def __init__(self, source: SourceCheckpoint) -> None:
        self._source = source
        self._opened: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._source.tensors

    def has_any(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._source.tensors)

    def names(self, prefix: str = "") -> list[str]:
        return [name for name in self._source.tensors if name.startswith(prefix)]

    def read(self, name: str) -> torch.Tensor:
        """On the host, as stored. Raises ModelError."""
        file = self._source.tensors[name].file
        if file not in self._opened:
            self._opened[file] = safe_open(file, framework="pt")
        try:
            tensor: torch.Tensor = self._opened[file].get_tensor(name)
        except Exception as error:  # the library's own kind, which is no subclass of another
            raise ModelError(f"{name} of {file} cannot be read: {error}") from error
        return tensor


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> int:
    """Returns their bytes. Raises ModelError where the file cannot be written."""
    part = path.with_name(f".{path.name}.part")
    try:
        save_file(
            {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, part, metadata={"format": "pt"}
        )
        os.replace(part, path)
    except Exception as error:  # of the library: disk full and others
        part.unlink(missing_ok=True)
        raise ModelError(f"{path} cannot be written: {error}") from error
    return sum(tensor.nbytes for tensor in tensors.values())


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All of one file. Raises ModelError."""
    try:
        return dict(load_file(path))
    except Exception as error:
        raise ModelError(f"{path} of an earlier run cannot be read: {error}; --overwrite starts again") from error
