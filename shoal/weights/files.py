"""The tensors of a model directory, by name, read piece by piece: safetensors (single or sharded) or .bin.

Used by the loader. Every error names the file or the tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from shoal.errors import ModelError
from shoal.weights.places import NO_WEIGHTS
from shoal.weights.safetensors_file import SafetensorsFile

# GGUF, the files of Mistral and Meta, those of other frameworks.
_OTHER_FORMATS = ("*.gguf", "consolidated*", "*.pth", "*.h5", "*.msgpack")


class TensorFile(Protocol):
    """One file of weights, opened. num_bytes_read: of its tensors."""

    num_bytes_read: int

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read_into(self, name: str, index: Sequence[slice], destination: torch.Tensor) -> None:
        """Fill `destination` with a piece of a tensor, converted to its type."""
        ...

    def close(self) -> None: ...


class BinFile:
    """A .bin file of torch.save, memory-mapped, read with weights_only (no code of the file's runs)."""

    def __init__(self, path: Path) -> None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch.load raises whatever the file provokes
            raise ModelError(f"{path} cannot be read as a file of weights: {error}") from None
        if not isinstance(content, dict):
            raise ModelError(f"{path} holds a {type(content).__name__}; expected tensors by name")
        self._tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
        self.num_bytes_read = 0

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read_into(self, name: str, index: Sequence[slice], destination: torch.Tensor) -> None:
        piece = self._tensors[name][tuple(index)]
        destination.copy_(piece)
        self.num_bytes_read += piece.nbytes

    def close(self) -> None:
        self._tensors.clear()


def open_weights(directory: str | Path, load_format: str) -> Iterator[TensorFile]:
    """The directory's weight files, one after the other, each closed when the next is asked for.

    load_format: "auto" (safetensors) or "pt" (.bin as well).
    """
    directory = Path(directory)
    paths = _find(directory, "model.safetensors", ".safetensors")
    if paths:
        yield from _in_turn(SafetensorsFile, paths)
        return
    paths = _find(directory, "pytorch_model.bin", ".bin")
    if not paths:
        others = sorted(path.name for suffix in _OTHER_FORMATS for path in directory.glob(suffix))
        found = f"; {others[0]} is of a format that is not read, the model's safetensors would be" if others else ""
        raise ModelError(
            f"{directory} has no weights: neither model.safetensors nor model.safetensors.index.json{found}"
        )
    if load_format != "pt":
        raise ModelError(
            f"{directory} has its weights in .bin files only ({next(iter(paths)).name}), an old pickle format; convert "
            "them to safetensors, or pass --load-format pt if you trust where they come from"
        )
    yield from _in_turn(BinFile, paths)


def _in_turn(open_file: Callable[[Path], TensorFile], paths: dict[Path, list[str]]) -> Iterator[TensorFile]:
    for path, promised in paths.items():
        file = open_file(path)
        try:
            _check_promised(file, path, promised)
            yield file
        finally:
            file.close()


def _find(directory: Path, single: str, suffix: str) -> dict[Path, list[str]]:
    """Files with the tensor names that an index promises for each (none without an index)."""
    index_path = directory / f"{single}.index.json"
    if index_path.exists():
        return _read_index(directory, index_path)
    if (directory / single).exists():
        return {directory / single: []}
    # AutoGPTQ names files by their format: gptq_model-4bit-128g.safetensors.index.json.
    indexes = [path for path in directory.glob(f"*{suffix}.index.json") if not path.name.startswith(NO_WEIGHTS)]
    if len(indexes) == 1:
        return _read_index(directory, indexes[0])
    found = [path for path in sorted(directory.glob(f"*{suffix}")) if not path.name.startswith(NO_WEIGHTS)]
    if any("-of-" in path.name for path in found):
        raise ModelError(f"{directory} has shards such as {found[0].name} but no {index_path.name}; download it too")
    return {path: [] for path in found}


def _read_index(directory: Path, index_path: Path) -> dict[Path, list[str]]:
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, list[str]] = {}
        for name, file_name in weight_map.items():
            files.setdefault(directory / file_name, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index_path} is broken: {type(error).__name__}: {error}; download it again") from None
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise ModelError(
            f"{directory}: {len(missing)} of {len(files)} weight files are missing: {', '.join(missing[:4])}; "
            "download them"
        )
    return files


def _check_promised(file: TensorFile, path: Path, promised: list[str]) -> None:
    absent = sorted(set(promised) - set(file.names())) if promised else []
    if absent:
        raise ModelError(f"{path} lacks {absent[0]}, which the index places there; download it again")
