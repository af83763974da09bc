"""Gemma, Phi-3 and GLM-4: absent keys take the defaults of Hugging Face's configuration classes."""

from __future__ import annotations

import math
from typing import Any

from shoal.config.families.common import Fields, number, size, take_text_config, window, windows_by_type
from shoal.config.rope import RopeConfig, parse_rope
from shoal.errors import ModelError


def gemma_fields(architecture: str, raw: dict[str, Any]) -> Fields:
    if raw.get("use_bidirectional_attention"):
        raise ModelError("use_bidirectional_attention is not supported: tokens see those before them only")
    first = architecture == "GemmaForCausalLM"
    rope = parse_rope(raw, size(raw, "max_position_embeddings", 8192))
    sizes = (3072, 24576, 28) if first else (2304, 9216, 26)
    fields = _fields(raw, rope, sizes, head_dim=256, norm_eps=1e-6, max_positions=8192)
    # The first configs said hidden_act, and meant the other.
    activation = raw.get("hidden_activation") or "gelu_pytorch_tanh"
    fields |= {"hidden_act": str(activation), "tie_word_embeddings": bool(raw.get("tie_word_embeddings", True))}
    if not first:
        # The model reads these; what is wrong is said now.
        query_scale(raw)
        softcaps(raw)
        num_layers = fields["num_layers"]
        every = ["full_attention" if (index + 1) % 2 == 0 else "sliding_attention" for index in range(num_layers)]
        fields["sliding_windows"] = windows_by_type(
            raw, num_layers, window(raw.get("sliding_window", 4096)), raw.get("layer_types") or every
        )
    return fields


def query_scale(raw: dict[str, Any]) -> float:
    """Of query times key, in Gemma 2 and 3. Raises ModelError."""
    return 1.0 / math.sqrt(number(raw, "query_pre_attn_scalar", 256.0))


def softcaps(raw: dict[str, Any]) -> tuple[float | None, float | None]:
    """Gemma 2's, of attention and of the logits; null: none. Raises ModelError."""
    names = (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))
    caps = [None if raw.get(name, default) is None else number(raw, name, default) for name, default in names]
    return caps[0], caps[1]


def gemma3_fields(architecture: str, raw: dict[str, Any]) -> Fields:
    """Of a checkpoint that sees images, too, the part for text. Layers with a window turn by `rope_local_theta`."""
    if architecture == "Gemma3ForConditionalGeneration":
        take_text_config(raw, num_attention_heads=8, num_key_value_heads=4, vocab_size=262208)
    if raw.get("use_bidirectional_attention"):
        raise ModelError("use_bidirectional_attention is not supported: tokens see those before them only")
    num_layers = size(raw, "num_hidden_layers", 26)
    max_positions = size(raw, "max_position_embeddings", 131072)
    nested = any(isinstance(value, dict) for value in (raw.get("rope_parameters") or {}).values())
    rope = parse_rope({"rope_theta": 1000000.0, **raw}, max_positions, layer_type="full_attention" if nested else None)
    local = number(raw, "rope_local_base_freq", 10000.0)
    if nested:
        local_rope = parse_rope({"rope_theta": local, **raw}, max_positions, layer_type="sliding_attention")
        if local_rope.scaling is not None:
            raise ModelError(f"rope scaling {local_rope.scaling!r} of sliding_attention layers is not supported")
        local = local_rope.theta
    raw["rope_local_theta"] = local
    every = size(raw, "sliding_window_pattern", 6)
    query_scale(raw)  # as above
    kinds = ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(num_layers)]
    fields = _fields(raw, rope, (2304, 9216, 26), head_dim=256, norm_eps=1e-6, max_positions=max_positions)
    return fields | {
        "num_layers": num_layers,
        "hidden_act": str(raw.get("hidden_activation") or "gelu_pytorch_tanh"),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", True)),
        "max_position_embeddings": max_positions,  # a scaling is counted in
        "sliding_windows": windows_by_type(
            raw, num_layers, window(raw.get("sliding_window", 4096)), raw.get("layer_types") or kinds
        ),
    }


def phi3_fields(architecture: str, raw: dict[str, Any]) -> Fields:
    max_positions = size(raw, "max_position_embeddings", 4096)
    rope = parse_rope({"original_max_position_embeddings": 4096, **raw}, max_positions, allows_partial=True)
    fields = _fields(raw, rope, (3072, 8192, 32), head_dim=None, norm_eps=1e-5, max_positions=max_positions)
    fields["sliding_windows"] = (window(raw.get("sliding_window")),) * fields["num_layers"]
    return fields


def glm_fields(architecture: str, raw: dict[str, Any]) -> Fields:
    max_positions = size(raw, "max_position_embeddings", 131072)
    rope = parse_rope({"partial_rotary_factor": 0.5, **raw}, max_positions, allows_partial=True)
    fields = _fields(raw, rope, (4096, 13696, 40), head_dim=128, norm_eps=1.5625e-07, max_positions=max_positions)
    kv_heads = size(raw, "num_key_value_heads", 2)
    return fields | {"num_kv_heads": kv_heads, "attention_bias": bool(raw.get("attention_bias", True))}


def _fields(
    raw: dict[str, Any],
    rope: RopeConfig,
    sizes: tuple[int, int, int],
    *,
    head_dim: int | None,
    norm_eps: float,
    max_positions: int,
) -> Fields:
    """Where the config says nothing: sizes are the hidden one, the MLP's, and the number of layers; head_dim None is
    the hidden size by heads."""
    hidden_size, num_heads = size(raw, "hidden_size", sizes[0]), size(raw, "num_attention_heads")
    num_layers = size(raw, "num_hidden_layers", sizes[2])
    if head_dim is None and raw.get("head_dim") is None:
        if hidden_size % num_heads:
            raise ModelError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
        head_dim = hidden_size // num_heads
    return {
        "vocab_size": size(raw, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": size(raw, "intermediate_size", sizes[1]),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": size(raw, "num_key_value_heads", num_heads),
        "head_dim": size(raw, "head_dim", head_dim),
        "max_position_embeddings": rope.max_length(max_positions),
        "norm_eps": number(raw, "rms_norm_eps", norm_eps),
        "hidden_act": str(raw.get("hidden_act", "silu")),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "attention_bias": bool(raw.get("attention_bias", False)),
        "rope": rope,
        "sliding_windows": (None,) * num_layers,
    }
