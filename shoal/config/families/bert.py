"""BERT, RoBERTa and XLM-RoBERTa: encoders, for vectors and scores of texts."""

from __future__ import annotations

from typing import Any

from shoal.config.families.common import Fields, number, size
from shoal.errors import ModelError


def bert_fields(architecture: str, raw: dict[str, Any]) -> Fields:
    hidden_size, num_heads = size(raw, "hidden_size", 768), size(raw, "num_attention_heads", 12)
    num_layers = size(raw, "num_hidden_layers", 12)
    if hidden_size % num_heads:
        raise ModelError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    if raw.get("is_decoder") or raw.get("add_cross_attention"):
        raise ModelError("is_decoder and add_cross_attention are not supported: the model is read as an encoder")
    kind = raw.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ModelError(f"position_embedding_type {kind!r} is not supported; absolute is")
    return {
        "vocab_size": size(raw, "vocab_size", 30522 if architecture.startswith("Bert") else 50265),
        "hidden_size": hidden_size,
        "intermediate_size": size(raw, "intermediate_size", 3072),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": size(raw, "max_position_embeddings", 512) - position_offset(architecture, raw),
        "norm_eps": number(raw, "layer_norm_eps", 1e-12),
        "hidden_act": str(raw.get("hidden_act", "gelu")),
        "tie_word_embeddings": False,
        "attention_bias": True,
        "rope": None,
        "sliding_windows": (None,) * num_layers,
    }


def position_offset(architecture: str, raw: dict[str, Any]) -> int:
    """The first row of the position table that a token has: RoBERTa counts on from the padding token's id."""
    if architecture.startswith("Bert"):
        return 0
    padding = raw.get("pad_token_id", 1)
    if not isinstance(padding, int) or isinstance(padding, bool) or padding < 0:
        raise ModelError(f"pad_token_id must be a token id, since positions count from it; found {padding!r}")
    return padding + 1
