"""ModelConfig: a model's config.json, read without torch or transformers and normalised to one set of names."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. `scaling` is None or one of "linear", "llama3", "yarn"; `parameters` holds its numbers."""

    theta: float
    scaling: str | None
    parameters: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the models, the loader and the KV cache sizing need to know. Sizes in elements."""

    path: str
    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    attention_bias: bool
    rope: RopeConfig | None
    # Per layer: None is full attention, else the window in tokens.
    sliding_windows: tuple[int | None, ...]
    # dtype of the checkpoint: "float32", "bfloat16", "float16".
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    # Sampling defaults of generation_config.json (temperature, top_p, top_k, repetition_penalty, min_p).
    generation_defaults: dict[str, Any]
    # The whole config.json: for what only one family has.
    raw: dict[str, Any]
