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
    "qwen2": ("Qwen2Config", {**_GATED, "use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}),
}


def make_other(directory: Path, name: str, *, seed: int = 0, **overrides: Any) -> Path:
    """Write one of OTHER_FAMILIES with random fp32 weights and a tokenizer. Returns the directory."""
    class_name, changes = OTHER_FAMILIES[name]
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
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    byte_level_tokenizer().save_pretrained(directory)
    return directory


def _is_size(key: str) -> bool:
    return key.startswith(("hidden_size", "num_", "max_position"))
