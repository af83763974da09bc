"""gpt-oss: absent keys take the defaults of Hugging Face's configuration class."""

from __future__ import annotations

from typing import Any

from shoal.config.experts import ExpertsConfig
from shoal.config.families.common import Fields, number, size, window, windows_by_type
from shoal.config.rope import parse_rope
from shoal.errors import ModelError

_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def gpt_oss_fields(architecture: str, raw: dict[str, Any]) -> Fields:
    num_layers, num_heads = size(raw, "num_hidden_layers", 36), size(raw, "num_attention_heads", 64)
    max_positions = size(raw, "max_position_embeddings", 131072)
    stated = {} if raw.get("rope_scaling") or raw.get("rope_parameters") else {"rope_parameters": _ROPE}
    rope = parse_rope({"rope_theta": 150000.0, **raw, **stated}, max_positions)
    num_experts = size(raw, "num_local_experts" if "num_local_experts" in raw else "num_experts", 128)
    # The first configs said it by this name.
    num_chosen = size(raw, "num_experts_per_tok", size(raw, "experts_per_token", 4))
    if num_chosen > num_experts:
        raise ModelError(f"num_experts_per_tok {num_chosen} is more than the {num_experts} experts")
    width = size(raw, "intermediate_size", 2880)
    every = ["full_attention" if index % 2 else "sliding_attention" for index in range(num_layers)]
    swiglu_numbers(raw)
    return {
        "vocab_size": size(raw, "vocab_size", 201088),
        "hidden_size": size(raw, "hidden_size", 2880),
        "intermediate_size": width,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": size(raw, "num_key_value_heads", 8),
        "head_dim": size(raw, "head_dim", 64),
        "max_position_embeddings": rope.max_length(max_positions),
        "norm_eps": number(raw, "rms_norm_eps", 1e-5),
        "hidden_act": str(raw.get("hidden_act", "silu")),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "attention_bias": bool(raw.get("attention_bias", True)),
        "rope": rope,
        "sliding_windows": windows_by_type(
            raw, num_layers, window(raw.get("sliding_window", 128)), raw.get("layer_types") or every
        ),
        "experts": ExpertsConfig(
            num_experts=num_experts,
            num_per_token=num_chosen,
            intermediate_size=width,
            layers=tuple(range(num_layers)),
        ),
    }


def swiglu_numbers(raw: dict[str, Any]) -> tuple[float, float]:
    """alpha and limit of the experts' activation. Raises ModelError."""
    return number(raw, "swiglu_alpha", 1.702), number(raw, "swiglu_limit", 7.0)
