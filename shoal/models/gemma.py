"""Gemma 1, 2 and 3 (Gemma Team 2024, 2024, 2025): norms that hold their weight less 1, embeddings scaled by sqrt(H).

2: caps on attention's logits and on the model's, every other layer a window. 3: norms of query and key heads instead of
caps, five layers with a window to one without, which turn by tables of their own. Text only: what a checkpoint has for
images is left aside.
"""

from __future__ import annotations

import torch

from shoal.config.families.decoders import query_scale, softcaps
from shoal.config.model_config import ModelConfig
from shoal.config.rope import RopeConfig
from shoal.layers.context import BuildContext
from shoal.layers.norm import OffsetRMSNorm, RMSNorm
from shoal.layers.rotary import RotaryEmbedding
from shoal.models.llama import LlamaForCausalLM, LlamaLayer
from shoal.models.sandwich import SandwichAttention, SandwichLayer
from shoal.models.text_part import TextPart


class GemmaLayer(LlamaLayer):
    norm_class = OffsetRMSNorm


class GemmaForCausalLM(LlamaForCausalLM):
    layer_class: type[LlamaLayer] = GemmaLayer

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        hidden = super().embed(token_ids)
        scale = torch.tensor(self.config.hidden_size**0.5, dtype=hidden.dtype)  # rounded as it was in training
        return hidden * scale.item()


class Gemma2Attention(SandwichAttention):
    def scale(self, config: ModelConfig) -> float:
        return query_scale(config.raw)

    def softcap(self, config: ModelConfig) -> float | None:
        return softcaps(config.raw)[0]


class Gemma2Layer(SandwichLayer):
    attention_class = Gemma2Attention
    norm_class = OffsetRMSNorm
    norm_names = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )


class Gemma2ForCausalLM(GemmaForCausalLM):
    layer_class = Gemma2Layer

    def logits_softcap(self, config: ModelConfig) -> float | None:
        return softcaps(config.raw)[1]


class Gemma3Attention(SandwichAttention):
    def scale(self, config: ModelConfig) -> float:
        return query_scale(config.raw)

    def head_norms(self, config: ModelConfig, context: BuildContext, prefix: str) -> dict[str, RMSNorm]:
        return {
            "query_norm": OffsetRMSNorm(context, f"{prefix}.q_norm", config.head_dim, config.norm_eps),
            "key_norm": OffsetRMSNorm(context, f"{prefix}.k_norm", config.head_dim, config.norm_eps),
        }


class Gemma3Layer(Gemma2Layer):
    attention_class = Gemma3Attention


class Gemma3ForCausalLM(TextPart, GemmaForCausalLM):
    layer_class = Gemma3Layer

    def make_rotaries(
        self, config: ModelConfig, num_positions: int, device: torch.device
    ) -> tuple[RotaryEmbedding, ...]:
        local = RopeConfig(theta=config.raw["rope_local_theta"], scaling=None, parameters={})
        return (
            *super().make_rotaries(config, num_positions, device),
            RotaryEmbedding(local, config.head_dim, num_positions, device),
        )

    def rotary_of(self, config: ModelConfig, index: int) -> RotaryEmbedding:
        return self.rotaries[0 if config.sliding_windows[index] is None else 1]
