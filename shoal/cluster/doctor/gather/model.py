"""A model's files on this machine: which there are, which the index misses, and whether sizes fit headers."""

from __future__ import annotations

import contextlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shoal.checksum import list_files
from shoal.cluster.doctor.facts import ModelFacts, ModelFile
from shoal.config.model_path import resolve_model_path
from shoal.errors import ShoalError
from shoal.weights.places import NO_WEIGHTS

_NUM_THREADS = 16
_LONGEST_HEADER = 100 << 20
_POINTER = b"version https://git-lfs"


def gather_model(name: str) -> ModelFacts:
    """Headers are read, tensors are not."""
    try:
        path = resolve_model_path(name)
        listing = list_files(path)
    except ShoalError as error:
        return ModelFacts(name=name, error=str(error))
    with ThreadPoolExecutor(_NUM_THREADS) as pool:  # a file system over the network answers many at once
        looked = list(pool.map(lambda item: _look(*item), listing.files.items()))
    files = [file for file, _ in looked]
    held = {file.name: tensors for file, tensors in looked if tensors is not None}
    files += [ModelFile(each, 0, problem=reason) for each, reason in listing.skipped.items()]
    missing, strays = _against_index(path, {file.name for file in files}, held)
    weights = _weight_files(path, {file.name for file in files})
    return ModelFacts(
        name=name,
        path=str(path),
        weights=sorted(weights),
        files=files,
        missing=missing,
        strays=strays,
        weight_bytes=sum(file.size for file in files if file.name in weights),
    )


def _look(name: str, path: Path) -> tuple[ModelFile, set[str] | None]:
    """A file, and the names of its tensors where it has a header that can be read."""
    try:
        size = path.stat().st_size
        if name == "config.json":
            return ModelFile(name, size, problem=_what_is_wrong_with_config(path)), None
        if not name.endswith(".safetensors"):
            return ModelFile(name, size), None
        with path.open("rb") as file:
            begin = file.read(8)
            if begin + file.read(len(_POINTER) - 8) == _POINTER:
                return ModelFile(name, size, problem="a pointer of git-lfs; `git lfs pull` brings the file"), None
            if len(begin) < 8:
                return ModelFile(name, size, problem="cut short: it has no header"), None
            file.seek(8)
            (length,) = struct.unpack("<Q", begin)
            if length > _LONGEST_HEADER:
                return ModelFile(name, size, problem="no safetensors file: its header would be too long"), None
            if length + 8 > size:
                return ModelFile(name, size, problem="cut short within its header"), None
            header = json.loads(file.read(length))
        tensors = {key: value for key, value in header.items() if key != "__metadata__"}
        end = max((int(value["data_offsets"][1]) for value in tensors.values()), default=0)
        return ModelFile(name, size, expected_bytes=8 + length + end), set(tensors)
    except OSError as error:
        return ModelFile(name, 0, problem=f"cannot be read: {error.strerror or error}"), None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        return ModelFile(name, size, problem=f"its header is damaged ({type(error).__name__})"), None


def _what_is_wrong_with_config(path: Path) -> str:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        return f"is not JSON: {error}"
    return "" if isinstance(config, dict) else f"holds no JSON object but a {type(config).__name__}"


def _weight_files(path: Path, names: set[str]) -> set[str]:
    """Those that the loader reads: what the index names, else the one file, else all of the directory itself."""
    for index, single, suffix in (
        ("model.safetensors.index.json", "model.safetensors", ".safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", ".bin"),
    ):
        if index in names:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                return set(json.loads((path / index).read_bytes())["weight_map"].values())
        if single in names:
            return {single}
        found = {
            name for name in names if name.endswith(suffix) and "/" not in name and not name.startswith(NO_WEIGHTS)
        }
        if found:
            return found
    return set()


def _against_index(path: Path, names: set[str], held: dict[str, set[str]]) -> tuple[list[str], list[str]]:
    """Files that an index names and nobody finds, and tensors that are not where it says."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if index not in names:
            continue
        try:
            places: dict[str, str] = json.loads((path / index).read_bytes())["weight_map"]
            missing = sorted(set(places.values()) - names)
            strays = [
                f"{tensor} ({file})" for tensor, file in places.items() if file in held and tensor not in held[file]
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return [], [f"{index} cannot be read: {error}"]
        return missing, sorted(strays)
    if "model.safetensors" not in names and any("-of-" in name and name.endswith(".safetensors") for name in names):
        return ["model.safetensors.index.json"], []
    return [], []
