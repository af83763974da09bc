"""Qwen3 (Yang et al. 2025): Llama that normalises every query and key head before the rotation."""

from __future__ import annotations

from shoal.config.model_config import ModelConfig
from shoal.layers.context import BuildContext
from shoal.layers.norm import RMSNorm
from shoal.models.llama import LlamaAttention, LlamaForCausalLM, LlamaLayer


class Qwen3Attention(LlamaAttention):
    def head_norms(self, config: ModelConfig, context: BuildContext, prefix: str) -> dict[str, RMSNorm]:
        return {
            "query_norm": RMSNorm(context, f"{prefix}.q_norm", config.head_dim, config.norm_eps),
            "key_norm": RMSNorm(context, f"{prefix}.k_norm", config.head_dim, config.norm_eps),
        }


class Qwen3Layer(LlamaLayer):
    attention_class = Qwen3Attention


class Qwen3ForCausalLM(LlamaForCausalLM):
    layer_class = Qwen3Layer
