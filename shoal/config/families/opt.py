"""OPT: learned positions, a plain MLP."""

from __future__ import annotations

from typing import Any

from shoal.config.families.common import Fields, size
from shoal.errors import ModelError


def opt_fields(architecture: str, raw: dict[str, Any]) -> Fields:
    hidden_size, num_heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    num_layers = size(raw, "num_hidden_layers")
    if hidden_size % num_heads:
        raise ModelError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    return {
        "vocab_size": size(raw, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": size(raw, "ffn_dim"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": size(raw, "max_position_embeddings", 2048),
        "norm_eps": 1e-5,
        "hidden_act": str(raw.get("activation_function", "relu")),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "attention_bias": bool(raw.get("enable_bias", True)),
        "rope": None,
        "sliding_windows": (None,) * num_layers,
    }
