"""What stands in a plain checkpoint, from the headers of its safetensors files alone. Without torch.

The format (github.com/huggingface/safetensors): 8 bytes with the length of a JSON header, the header, the data.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from shoal.errors import ModelError

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
    found = config.get("quantization_config")
    if found is None and (directory / "quantize_config.json").is_file():
        found = _read_json(directory / "quantize_config.json") | {"quant_method": "gptq"}
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise ModelError(f"{directory} is quantized already (by {method}); give the plain model that it was made from")
    if (directory / INDEX).is_file():
        weight_map = _read_json(directory / INDEX).get("weight_map") or {}
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{directory} holds no *.safetensors files; other kinds of weights are not read here")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= _read_header(file)
    return SourceCheckpoint(directory, config, tensors)


def _read_header(file: Path) -> dict[str, StoredTensor]:
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
    except (OSError, ValueError, KeyError, TypeError) as error:
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
