"""Qwen2 (Yang et al. 2024): Llama with biases on the query, key and value projections, and on no other."""

from __future__ import annotations

from shoal.config.model_config import ModelConfig
from shoal.models.llama import LlamaAttention, LlamaForCausalLM, LlamaLayer


class Qwen2Attention(LlamaAttention):
    def has_output_bias(self, config: ModelConfig) -> bool:
        return False


class Qwen2Layer(LlamaLayer):
    attention_class = Qwen2Attention


class Qwen2ForCausalLM(LlamaForCausalLM):
    layer_class = Qwen2Layer
