"""A model directory with a config.json and nothing else: enough for whatever does not read weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "rope_theta": 10000.0,
    "eos_token_id": 2,
}


def write_model_directory(path: Path, **changes: Any) -> Path:
    """`changes` replace or add keys of config.json."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**QWEN2, **changes}), encoding="utf-8")
    return path
