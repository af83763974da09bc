"""A model's directory as far as the doctor looks into it: shards of zeros with true headers, and their index."""

from __future__ import annotations

import json
import struct
from pathlib import Path

_TENSOR_BYTES = 4096


def write_model(directory: Path, num_shards: int = 3, tensors_a_shard: int = 2) -> Path:
    directory.mkdir(parents=True)
    weight_map = {}
    for shard in range(1, num_shards + 1):
        name = f"model-{shard:05}-of-{num_shards:05}.safetensors"
        header = {}
        for index in range(tensors_a_shard):
            tensor = f"model.layers.{shard}.{index}.weight"
            weight_map[tensor] = name
            offsets = [index * _TENSOR_BYTES, (index + 1) * _TENSOR_BYTES]
            header[tensor] = {"dtype": "F32", "shape": [_TENSOR_BYTES // 4], "data_offsets": offsets}
        encoded = json.dumps(header).encode()
        content = struct.pack("<Q", len(encoded)) + encoded + bytes(tensors_a_shard * _TENSOR_BYTES)
        (directory / name).write_bytes(content)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (directory / "tokenizer.json").write_text("{}")
    return directory


def flip_byte(path: Path) -> None:
    """The last one: the file's size, and its header, stay as they are."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
