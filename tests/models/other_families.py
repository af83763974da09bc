"""Random checkpoints of families without a native file, for tests of what serves them through Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.checkpoints import VOCAB_SIZE, byte_level_tokenizer

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED: dict[str, Any] = {"intermediate_size": 112, "num_key_value_heads": 2}
# name -> (class of the configuration, changes)
OTHER_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "stablelm": ("StableLmConfig", {**_GATED, "use_qkv_bias": True}),
    "stablelm-head-norms": ("StableLmConfig", {**_GATED, "qk_layernorm": True, "use_parallel_residual": True}),
    "olmo": ("OlmoConfig", {**_GATED, "clip_qkv": 2.0}),
    "olmo2": ("Olmo2Config", {**_GATED, "tie_word_embeddings": True}),
    "olmo3": ("Olmo3Config", {**_GATED, "sliding_window": 24}),
    "gpt-neox": ("GPTNeoXConfig", {"intermediate_size": 112, "rotary_pct": 0.5}),
    "granite": (
        "GraniteConfig",
        {
            **_GATED,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.5,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
            "tie_word_embeddings": True,
        },
    ),
    "starcoder2": ("Starcoder2Config", {**_GATED, "sliding_window": 24, "use_bias": True}),
    "phi": ("PhiConfig", {**_GATED, "partial_rotary_factor": 0.5}),
    "cohere": ("CohereConfig", {**_GATED, "use_qk_norm": True, "logit_scale": 0.2}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}),
    "gpt-bigcode": ("GPTBigCodeConfig", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}),
    "nemotron": ("NemotronConfig", {**_GATED, "partial_rotary_factor": 0.5}),
    "persimmon": ("PersimmonConfig", {"intermediate_size": 112}),
    "apertus": ("ApertusConfig", _GATED),
    # Its code looks at the config of its rotary embedding, and calls the decoder in its decoder.
    "granite-swa": ("GraniteSWAConfig", {**_GATED, "sliding_window": 24, "attention_multiplier": 0.3}),
    # Scales what it embeds in place.
    "ctrl": ("CTRLConfig", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "dff": 112}),
    "opt": ("OPTConfig", {"ffn_dim": 112, "word_embed_proj_dim": 64}),
    "qwen2": ("Qwen2Config", {**_GATED, "use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}),
}
_ROUTED: dict[str, Any] = {**_GATED, "intermediate_size": 48, "num_experts_per_tok": 3}
_HALVES = [1.0, 1.1, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0]
# With experts: their matrices one by one (called so or so) or stacked, shared ones, dense layers, a correction.
OTHER_EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("OlmoeConfig", {**_ROUTED, "num_experts": 7}),
    "granite-moe": ("GraniteMoeConfig", {**_ROUTED, "num_local_experts": 7, "attention_multiplier": 0.3}),
    "glm4-moe": (
        "Glm4MoeConfig",
        {
            **_ROUTED,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
    # The router is a linear layer, whose weight its code looks at.
    "hunyuan-moe": ("HunYuanMoEV1Config", {**_ROUTED, "num_experts": 6, "moe_topk": 2, "head_dim": 16}),
    "phimoe": (
        "PhimoeConfig",
        {
            **_ROUTED,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "lm_head_bias": True,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": _HALVES,
                "long_factor": [2 * each for each in _HALVES],
                "short_mscale": 1.1,
                "long_mscale": 1.2,
                "original_max_position_embeddings": 64,
            },
        },
    ),
}


def make_other(directory: Path, name: str, *, seed: int = 0, **overrides: Any) -> Path:
    """Write one of OTHER_FAMILIES or OTHER_EXPERTS with random fp32 weights and a tokenizer. Returns the directory."""
    class_name, changes = (OTHER_FAMILIES | OTHER_EXPERTS)[name]
    common = {key: value for key, value in _COMMON.items() if "n_embd" not in changes or not _is_size(key)}
    config = getattr(transformers, class_name)(**{**common, **changes, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                spread = 0.5 if "embed" in key else 1.5 / parameter.shape[1] ** 0.5
                parameter.normal_(0.0, spread, generator=generator)
            elif parameter.numel() > 1:
                is_norm = "norm" in key and key.endswith("weight")
                parameter.normal_(1.0 if is_norm else 0.0, 0.2, generator=generator)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2, generator=generator)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    byte_level_tokenizer().save_pretrained(directory)
    return directory


def _is_size(key: str) -> bool:
    return key.startswith(("hidden_size", "num_", "max_position"))
