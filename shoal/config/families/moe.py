"""Mixtral, Qwen2-MoE, Qwen3-MoE: the shapes of Llama with experts in place of the MLP in some layers or all."""

from __future__ import annotations

from typing import Any

from shoal.config.experts import ExpertsConfig
from shoal.config.families.common import Fields, count, number, size, window, windows_by_type
from shoal.config.rope import parse_rope
from shoal.errors import ModelError


def moe_fields(architecture: str, raw: dict[str, Any]) -> Fields:
    hidden_size, num_heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    num_layers = size(raw, "num_hidden_layers")
    is_mixtral = architecture == "MixtralForCausalLM"
    max_positions = size(raw, "max_position_embeddings", 131072 if is_mixtral else 32768)
    rope = parse_rope({"rope_theta": 1000000.0, **raw} if is_mixtral else raw, max_positions)
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise ModelError(
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, and there is no head_dim"
        )
    kv_heads_default = 8 if is_mixtral and "num_key_value_heads" not in raw else num_heads
    biases = {
        "MixtralForCausalLM": False,
        "Qwen2MoeForCausalLM": raw.get("qkv_bias", True),
        "Qwen3MoeForCausalLM": raw.get("attention_bias", False),
    }
    experts = _experts(architecture, raw, num_layers)
    # Where no layer is dense there may be no such size, and nothing has it.
    is_sparse = len(experts.layers) == num_layers
    return {
        "vocab_size": size(raw, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": size(raw, "intermediate_size", experts.intermediate_size if is_sparse else None),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": size(raw, "num_key_value_heads", kv_heads_default),
        "head_dim": size(raw, "head_dim", hidden_size // num_heads),
        "max_position_embeddings": rope.max_length(max_positions),
        "norm_eps": number(raw, "rms_norm_eps", 1e-5 if is_mixtral else 1e-6),
        "hidden_act": str(raw.get("hidden_act", "silu")),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "attention_bias": bool(biases[architecture]),
        "rope": rope,
        "sliding_windows": _sliding_windows(architecture, raw, num_layers),
        "experts": experts,
    }


def _experts(architecture: str, raw: dict[str, Any], num_layers: int) -> ExpertsConfig:
    if architecture == "MixtralForCausalLM":
        num_experts, num_chosen = size(raw, "num_local_experts", 8), size(raw, "num_experts_per_tok", 2)
        width, layers, shared = size(raw, "intermediate_size"), tuple(range(num_layers)), 0
    else:
        # Transformers writes num_local_experts for Qwen3-MoE since its version 5.
        name = "num_experts" if "num_experts" in raw else "num_local_experts"
        is_third = architecture == "Qwen3MoeForCausalLM"
        num_experts = size(raw, name, 128 if is_third else 60)
        num_chosen = size(raw, "num_experts_per_tok", 8 if is_third else 4)
        width = size(raw, "moe_intermediate_size", 768 if is_third else 1408)
        step, dense = size(raw, "decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(each) is int and each >= 0 for each in dense):
            raise ModelError(f"mlp_only_layers must be a list of layers' numbers; found {dense!r}")
        layers = tuple(index for index in range(num_layers) if index not in dense and (index + 1) % step == 0)
        shared = 0 if is_third else size(raw, "shared_expert_intermediate_size", 5632)
    if num_chosen > num_experts:
        raise ModelError(f"num_experts_per_tok {num_chosen} is more than the {num_experts} experts")
    return ExpertsConfig(
        num_experts=num_experts,
        num_per_token=num_chosen,
        intermediate_size=width,
        layers=layers,
        shared_size=shared,
    )


def _sliding_windows(architecture: str, raw: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    if architecture == "MixtralForCausalLM":
        return (window(raw.get("sliding_window")),) * num_layers
    width = window(raw.get("sliding_window", 4096)) if raw.get("use_sliding_window", False) else None
    if architecture == "Qwen3MoeForCausalLM":
        return (width,) * num_layers
    layer_types = raw.get("layer_types")
    if layer_types is not None:
        return windows_by_type(raw, num_layers, width, layer_types)
    # Every other layer, from the first on, below max_window_layers.
    first_full = count(raw, "max_window_layers", 28)
    return tuple(width if index % 2 == 0 and index < first_full else None for index in range(num_layers))
