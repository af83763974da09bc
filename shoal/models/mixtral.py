"""Mixtral (Jiang et al. 2024): Mistral whose MLP is a mixture of experts in every layer."""

from __future__ import annotations

from shoal.config.model_config import ModelConfig
from shoal.layers.context import BuildContext
from shoal.layers.moe import ExpertNames, MixtureOfExperts, RoutedExperts, Router, expert_activation
from shoal.layers.routing import SoftmaxTopK
from shoal.models.llama import LlamaForCausalLM, LlamaLayer

_NAMES = ExpertNames(gate_up=("w1", "w3"), down="w2")


class MixtralLayer(LlamaLayer):
    def make_mlp(self, config: ModelConfig, context: BuildContext, index: int) -> MixtureOfExperts:
        prefix, sizes = f"model.layers.{index}.block_sparse_moe", config.experts
        assert sizes is not None
        experts = RoutedExperts(
            context,
            f"{prefix}.experts",
            num_experts=sizes.num_experts,
            hidden_size=config.hidden_size,
            intermediate_size=sizes.intermediate_size,
            activation=expert_activation(context, config.hidden_act),
            names=_NAMES,
        )
        router = Router(context, f"{prefix}.gate", config.hidden_size, sizes.num_experts)
        return MixtureOfExperts(router, SoftmaxTopK(sizes.num_per_token, normalize=True), experts)


class MixtralForCausalLM(LlamaForCausalLM):
    layer_class = MixtralLayer
