"""Qwen3 (Yang et al. 2025): Llama that normalises every query and key head before the rotation.

T tokens, Hq query heads, Hk KV heads, D head size.
"""

from __future__ import annotations

import torch

from shoal.config.model_config import ModelConfig
from shoal.layers.context import BuildContext
from shoal.layers.norm import RMSNorm
from shoal.layers.rotary import RotaryEmbedding
from shoal.models.llama import LlamaAttention, LlamaForCausalLM, LlamaLayer


class Qwen3Attention(LlamaAttention):
    def __init__(
        self, config: ModelConfig, context: BuildContext, prefix: str, window: int | None, rotary: RotaryEmbedding
    ) -> None:
        super().__init__(config, context, prefix, window, rotary)
        self.q_norm = RMSNorm(context, f"{prefix}.q_norm", config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(context, f"{prefix}.k_norm", config.head_dim, config.norm_eps)

    def normalize(self, query_key: torch.Tensor) -> torch.Tensor:
        query, key = query_key.split([self.num_heads, self.num_kv_heads], dim=1)
        return torch.cat([self.q_norm(query), self.k_norm(key)], dim=1)


class Qwen3Layer(LlamaLayer):
    attention_class = Qwen3Attention


class Qwen3ForCausalLM(LlamaForCausalLM):
    layer_class = Qwen3Layer
