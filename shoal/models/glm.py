"""GLM-4 (Team GLM 2024): Llama that turns half of each head, in neighbouring pairs; gate and up are stored as one.

The 2025 form (Glm4ForCausalLM) normalises what attention and MLP give, too.
"""

from __future__ import annotations

import torch

from shoal.config.model_config import ModelConfig
from shoal.layers.rotary import RotaryEmbedding
from shoal.models.llama import LlamaAttention, LlamaForCausalLM, LlamaLayer, LlamaMLP
from shoal.models.sandwich import SandwichAttention, SandwichLayer, SandwichMLP


class GlmAttention(LlamaAttention):
    def has_output_bias(self, config: ModelConfig) -> bool:
        return False


class GlmMLP(LlamaMLP):
    gate_up_names = "gate_up_proj"


class GlmLayer(LlamaLayer):
    attention_class = GlmAttention
    mlp_class: type[LlamaMLP] = GlmMLP


class GlmForCausalLM(LlamaForCausalLM):
    layer_class: type[LlamaLayer] = GlmLayer

    def make_rotaries(
        self, config: ModelConfig, num_positions: int, device: torch.device
    ) -> tuple[RotaryEmbedding, ...]:
        assert config.rope is not None
        return (RotaryEmbedding(config.rope, config.head_dim, num_positions, device, interleaved=True),)


class Glm4Attention(SandwichAttention):
    def has_output_bias(self, config: ModelConfig) -> bool:
        return False


class Glm4MLP(SandwichMLP):
    gate_up_names = "gate_up_proj"


class Glm4Layer(SandwichLayer):
    attention_class = Glm4Attention
    mlp_class = Glm4MLP
    norm_names = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")


class Glm4ForCausalLM(GlmForCausalLM):
    layer_class = Glm4Layer
