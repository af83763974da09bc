"""Llama, Mistral, Mistral 3, Qwen2, Qwen3: absent keys take the defaults of Hugging Face's configuration classes."""

from __future__ import annotations

from typing import Any

from shoal.config.families.common import (
    Fields,
    count,
    number,
    size,
    take_text_config,
    window,
    windows_by_type,
)
from shoal.config.rope import parse_rope
from shoal.errors import ModelError


def llama_fields(architecture: str, raw: dict[str, Any]) -> Fields:
    hidden_size, num_heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    num_layers = size(raw, "num_hidden_layers")
    positions_default = {"LlamaForCausalLM": 2048, "MistralForCausalLM": 131072}.get(architecture, 32768)
    max_positions = size(raw, "max_position_embeddings", positions_default)
    rope = parse_rope(raw, max_positions)
    fixed_head_dim = architecture == "Qwen3ForCausalLM" and "head_dim" not in raw
    if raw.get("head_dim") is None and not fixed_head_dim and hidden_size % num_heads:
        raise ModelError(
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, and there is no head_dim"
        )
    # Mistral's absent key means 8, its explicit null as many as query heads.
    absent_means_8 = architecture == "MistralForCausalLM" and "num_key_value_heads" not in raw
    attention_bias = architecture == "Qwen2ForCausalLM" or bool(raw.get("attention_bias", False))
    return {
        "vocab_size": size(raw, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": size(raw, "intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": size(raw, "num_key_value_heads", 8 if absent_means_8 else num_heads),
        "head_dim": size(raw, "head_dim", 128 if fixed_head_dim else hidden_size // num_heads),
        "max_position_embeddings": rope.max_length(max_positions),
        "norm_eps": number(raw, "rms_norm_eps", 1e-6),
        "hidden_act": str(raw.get("hidden_act", "silu")),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "attention_bias": attention_bias and architecture != "MistralForCausalLM",
        "rope": rope,
        "sliding_windows": _sliding_windows(architecture, raw, num_layers),
    }


def mistral3_fields(architecture: str, raw: dict[str, Any]) -> Fields:
    """Mistral Small 3.1 and 3.2: the part for text."""
    take_text_config(raw)
    if (kind := raw.get("model_type")) != "mistral":
        raise ModelError(f"model_type {kind!r} of text_config is not supported for {architecture}; mistral is")
    return llama_fields("MistralForCausalLM", raw)


def _sliding_windows(architecture: str, raw: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    if architecture == "MistralForCausalLM":
        return (window(raw.get("sliding_window", 4096)),) * num_layers
    if architecture not in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        return (None,) * num_layers
    width = window(raw.get("sliding_window", 4096)) if raw.get("use_sliding_window", False) else None
    layer_types = raw.get("layer_types")
    if layer_types is None:
        first = count(raw, "max_window_layers", 28)
        return tuple(width if index >= first else None for index in range(num_layers))
    return windows_by_type(raw, num_layers, width, layer_types)
