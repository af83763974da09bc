"""DeepSeek-V2 and V3, whose shape R1, V3.1 and Kimi-K2 have: absent keys are as in Hugging Face's classes."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from shoal.config.experts import ExpertsConfig
from shoal.config.families.common import Fields, number, size
from shoal.config.rope import parse_rope
from shoal.errors import ModelError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSizes:
    """Of multi-head latent attention. query_rank: of what queries are made from; None: of the hidden state itself.
    rank: of what keys and values are made from. plain, turning: numbers of a query or key head that keep still and that
    turn with the position, those of keys shared by all heads. value: numbers of a value head."""

    query_rank: int | None
    rank: int
    plain: int
    turning: int
    value: int

    @property
    def query(self) -> int:
        return self.plain + self.turning

    @property
    def cached(self) -> int:
        """Numbers a token in the cache."""
        return self.rank + self.turning


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """scores: of the experts, by their logits. num_groups: that experts are cut into, of which a token's come from the
    best num_chosen_groups; a group is as good as the sum of its `group_width` best scores. has_correction: the
    checkpoint has a number for each expert that is added to its score for the choice alone. normalize: the weights sum
    to 1 before they are multiplied by scale."""

    scores: Literal["softmax", "sigmoid"]
    num_groups: int
    num_chosen_groups: int
    group_width: int
    has_correction: bool
    normalize: bool
    scale: float


def latent_sizes(raw: dict[str, Any]) -> LatentSizes:
    """Raises ModelError."""
    # An absent key has a default, null means that there is no such rank.
    has_query_rank = raw.get("q_lora_rank", 1536) is not None
    return LatentSizes(
        query_rank=size(raw, "q_lora_rank", 1536) if has_query_rank else None,
        rank=size(raw, "kv_lora_rank", 512),
        plain=size(raw, "qk_nope_head_dim", 128),
        turning=size(raw, "qk_rope_head_dim", 64),
        value=size(raw, "v_head_dim", 128),
    )


def turns_interleaved(raw: dict[str, Any]) -> bool:
    """Whether neighbours of a head turn together, as the checkpoints have them."""
    return bool(raw.get("rope_interleave", True))


def deepseek_fields(architecture: str, raw: dict[str, Any]) -> Fields:
    num_layers, num_heads = size(raw, "num_hidden_layers"), size(raw, "num_attention_heads")
    max_positions = size(raw, "max_position_embeddings", 2048 if architecture == "DeepseekV2ForCausalLM" else 4096)
    rope, sizes = parse_rope(raw, max_positions), latent_sizes(raw)
    if sizes.turning % 2:
        raise ModelError(f"qk_rope_head_dim {sizes.turning} is odd; numbers turn in pairs")
    experts = _experts(architecture, raw, num_layers)
    is_sparse = experts is not None and len(experts.layers) == num_layers
    return {
        "vocab_size": size(raw, "vocab_size"),
        "hidden_size": size(raw, "hidden_size"),
        "intermediate_size": size(
            raw, "intermediate_size", experts.intermediate_size if experts is not None and is_sparse else None
        ),
        "num_layers": num_layers,
        "num_heads": num_heads,
        # Keys and values are made for each head; what is cached is for all of them.
        "num_kv_heads": num_heads,
        "head_dim": sizes.query,
        "max_position_embeddings": rope.max_length(max_positions),
        "norm_eps": number(raw, "rms_norm_eps", 1e-6),
        "hidden_act": str(raw.get("hidden_act", "silu")),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "attention_bias": bool(raw.get("attention_bias", False)),
        "rope": rope,
        "sliding_windows": (None,) * num_layers,
        "latent_cache_dim": sizes.cached,
        "experts": experts,
    }


def _experts(architecture: str, raw: dict[str, Any], num_layers: int) -> ExpertsConfig | None:
    is_second = architecture == "DeepseekV2ForCausalLM"
    if raw.get("n_routed_experts", 64) is None:
        return None
    num_experts = size(raw, "n_routed_experts", 64 if is_second else 256)
    num_chosen = size(raw, "num_experts_per_tok", None if is_second else 8)
    width = size(raw, "moe_intermediate_size", 1407 if is_second else 2048)
    num_shared = raw.get("n_shared_experts", 2 if is_second else 1)
    first, step = raw.get("first_k_dense_replace", 0 if is_second else 3), size(raw, "moe_layer_freq", 1)
    for name, value in (("n_shared_experts", num_shared), ("first_k_dense_replace", first)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise ModelError(f"{name} must be an integer from 0 on; found {value!r}")
    layers = tuple(index for index in range(num_layers) if index >= (first or 0) and index % step == 0)
    if not layers:
        return None
    if num_chosen > num_experts:
        raise ModelError(f"num_experts_per_tok {num_chosen} is more than the {num_experts} experts")
    routing = routing_config(architecture, raw)
    if num_experts % routing.num_groups:
        raise ModelError(f"n_routed_experts {num_experts} is not a multiple of n_group {routing.num_groups}")
    in_group = num_experts // routing.num_groups
    if routing.num_chosen_groups > routing.num_groups or routing.num_chosen_groups * in_group < num_chosen:
        raise ModelError(
            f"topk_group {routing.num_chosen_groups} of n_group {routing.num_groups} groups of {in_group} experts do "
            f"not hold the {num_chosen} of num_experts_per_tok"
        )
    if routing.group_width > in_group:
        raise ModelError(
            f"groups of {in_group} experts are judged by their {routing.group_width} best; use fewer groups"
        )
    return ExpertsConfig(
        num_experts=num_experts,
        num_per_token=num_chosen,
        intermediate_size=width,
        layers=layers,
        shared_size=width * (num_shared or 0),
    )


def routing_config(architecture: str, raw: dict[str, Any]) -> RoutingConfig:
    """Raises ModelError."""
    is_second = architecture == "DeepseekV2ForCausalLM"
    method = raw.get("topk_method") or ("greedy" if is_second else "noaux_tc")
    scores = raw.get("scoring_func") or ("softmax" if is_second else "sigmoid")
    known = {"softmax": ("greedy", "group_limited_greedy")} if is_second else {"sigmoid": ("noaux_tc",)}
    if method not in known.get(scores, ()):
        supported = "; ".join(f"{name} with {' or '.join(methods)}" for name, methods in known.items())
        raise ModelError(
            f"scoring_func {scores!r} with topk_method {method!r} is not supported for {architecture}; "
            f"supported: {supported}"
        )
    scale = raw.get("routed_scaling_factor", 1.0 if is_second else 2.5)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ModelError(f"routed_scaling_factor must be a number; found {scale!r}")
    normalize = bool(raw.get("norm_topk_prob", not is_second))
    if is_second and normalize and scale != 1:
        raise ModelError(
            f"norm_topk_prob with routed_scaling_factor {scale} is not supported for {architecture}, whose versions "
            "disagree on what that means; one of them without the other is"
        )
    is_grouped = method != "greedy"
    return RoutingConfig(
        scores="softmax" if is_second else "sigmoid",
        num_groups=size(raw, "n_group", 1 if is_second else 8) if is_grouped else 1,
        num_chosen_groups=size(raw, "topk_group", 1 if is_second else 4) if is_grouped else 1,
        # With one group there is nothing to judge.
        group_width=2 if not is_second and raw.get("n_group", 8) != 1 else 1,
        has_correction=method == "noaux_tc",
        normalize=normalize,
        scale=float(scale),
    )
