"""Qwen3-MoE (Yang et al. 2025): Qwen3 with many small experts, and none that is shared."""

from __future__ import annotations

from shoal.config.model_config import ModelConfig
from shoal.layers.context import BuildContext
from shoal.layers.moe import MixtureOfExperts
from shoal.models.llama import LlamaForCausalLM, LlamaMLP
from shoal.models.qwen2_moe import qwen_mlp
from shoal.models.qwen3 import Qwen3Layer


class Qwen3MoeLayer(Qwen3Layer):
    def make_mlp(self, config: ModelConfig, context: BuildContext, index: int) -> LlamaMLP | MixtureOfExperts:
        return qwen_mlp(config, context, index)


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    layer_class = Qwen3MoeLayer
