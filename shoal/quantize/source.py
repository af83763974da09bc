"""What stands in a plain checkpoint, from the headers of its safetensors files alone. Without torch.

The format (github.com/huggingface/safetensors): 8 bytes with the length of a JSON header, the header, the data.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from shoal.errors import ModelError
from shoal.weights.places import NO_WEIGHTS

INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """file: its path. num_bytes: of the data."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class SourceCheckpoint:
    """A directory with config.json, its config and its tensors by name."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def read_source(directory: Path) -> SourceCheckpoint:
    """Raises ModelError for what is no whole plain safetensors checkpoint of a family that Transformers knows."""
    config = _read_json(directory / "config.json")
    if config.get("model_type") == "qwen" or "QWenLMHeadModel" in (config.get("architectures") or ()):
        raise ModelError(
            f"{directory}: the first Qwen (QWenLMHeadModel) cannot be quantized, since Transformers has no code for "
            "it; Qwen2 and later can be"
        )
    found = config.get("quantization_config") or config.get("compression_config")
    for name, maker in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if found is None and (directory / name).is_file():
            found = {"quant_method": maker}
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise ModelError(f"{directory} is quantized already (by {method}); give the plain model that it was made from")
    files = _weight_files(directory)
    if not files:
        raise ModelError(f"{directory} holds no *.safetensors files; other kinds of weights are not read here")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= read_header(file)
    return SourceCheckpoint(directory, config, tensors)


def _weight_files(directory: Path) -> list[Path]:
    """By the index, else the one of the usual name, else all that are weights."""
    if (directory / INDEX).is_file():
        weight_map = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"{directory / INDEX} has no weight_map of names; download it again")
        return [directory / name for name in sorted(set(weight_map.values()))]
    single = directory / INDEX.removesuffix(".index.json")
    if single.is_file():
        return [single]
    found = [path for path in sorted(directory.glob("*.safetensors")) if not path.name.startswith(NO_WEIGHTS)]
    if any("-of-" in path.name for path in found):
        raise ModelError(f"{directory} has shards such as {found[0].name} but no {INDEX}; download it too")
    return found


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file. Raises ModelError."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = file.stat().st_size
            if not 2 <= length <= size - 8:
                raise ValueError(f"its {size} bytes do not begin with a header")
            header = json.loads(opened.read(length))
        found, end = {}, 0
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            end = max(end, stop)
            found[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), stop - start)
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes, its header describes {8 + length + end}")
        return found
    except FileNotFoundError:
        raise ModelError(f"{file} is missing, which {INDEX} names; the download is not complete") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} cannot be read: {error}; download it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; a Hugging Face directory with safetensors would work") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold an object")
    return found
