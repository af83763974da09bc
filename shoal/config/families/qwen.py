"""The first Qwen (QWenLMHeadModel, 2023): its own names for everything; absent keys as in the class it came with."""

from __future__ import annotations

from typing import Any

from shoal.config.families.common import Fields, number, size
from shoal.config.rope import RopeConfig
from shoal.errors import ModelError


def qwen_fields(architecture: str, raw: dict[str, Any]) -> Fields:
    """intermediate_size counts gate and up together. Trained up to `seq_length`; with dynamic NTK, used up to
    max_position_embeddings (`models/qwen.py`)."""
    hidden_size, num_heads = size(raw, "hidden_size", 4096), size(raw, "num_attention_heads", 32)
    num_layers, head_dim = size(raw, "num_hidden_layers", 32), size(raw, "kv_channels", 128)
    both = size(raw, "intermediate_size", 22016)
    if both % 2:
        raise ModelError(f"intermediate_size {both} is odd; it counts gate and up together")
    if raw.get("rotary_pct", 1.0) != 1.0:
        raise ModelError(f"rotary_pct {raw['rotary_pct']!r} is not supported; only 1.0 is")
    trained = size(raw, "seq_length", 8192)
    longest = size(raw, "max_position_embeddings", 8192) if raw.get("use_dynamic_ntk", True) else trained
    return {
        "vocab_size": size(raw, "vocab_size", 151936),
        "hidden_size": hidden_size,
        "intermediate_size": both // 2,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max(trained, longest),
        "default_max_len": trained,
        "norm_eps": number(raw, "layer_norm_epsilon", 1e-6),
        "hidden_act": "silu",
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "attention_bias": True,
        "rope": RopeConfig(
            theta=number(raw, "rotary_emb_base", 10000),
            scaling="qwen_dynamic" if raw.get("use_dynamic_ntk", True) else None,
            parameters={"original_max_position_embeddings": trained},
        ),
        "sliding_windows": (None,) * num_layers,
    }
