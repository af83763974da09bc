"""Qwen2-MoE (Yang et al. 2024): Qwen2 with many small experts and a gated one that all tokens share; some layers may be
dense. Qwen3-MoE builds on this."""

from __future__ import annotations

from shoal.config.model_config import ModelConfig
from shoal.layers.context import BuildContext
from shoal.layers.moe import MixtureOfExperts, RoutedExperts, Router, SharedExpert, expert_activation
from shoal.layers.routing import SoftmaxTopK
from shoal.models.llama import LlamaForCausalLM, LlamaMLP
from shoal.models.qwen2 import Qwen2Layer


def qwen_mlp(config: ModelConfig, context: BuildContext, index: int) -> LlamaMLP | MixtureOfExperts:
    """The MLP of a layer: experts where the config says so, and a shared one where it has a size for it."""
    prefix, sizes = f"model.layers.{index}.mlp", config.experts
    assert sizes is not None
    if index not in sizes.layers:
        return LlamaMLP(config, context, prefix)
    experts = RoutedExperts(
        context,
        f"{prefix}.experts",
        num_experts=sizes.num_experts,
        hidden_size=config.hidden_size,
        intermediate_size=sizes.intermediate_size,
        activation=expert_activation(context, config.hidden_act),
    )
    shared = None
    if sizes.shared_size:
        shared = SharedExpert(
            context,
            f"{prefix}.shared_expert",
            config.hidden_size,
            sizes.shared_size,
            config.hidden_act,
            gate=f"{prefix}.shared_expert_gate",
            leaves_sum=experts.leaves_sum,
        )
    router = Router(context, f"{prefix}.gate", config.hidden_size, sizes.num_experts)
    routing = SoftmaxTopK(sizes.num_per_token, normalize=bool(config.raw.get("norm_topk_prob", False)))
    return MixtureOfExperts(router, routing, experts, shared)


class Qwen2MoeLayer(Qwen2Layer):
    def make_mlp(self, config: ModelConfig, context: BuildContext, index: int) -> LlamaMLP | MixtureOfExperts:
        return qwen_mlp(config, context, index)


class Qwen2MoeForCausalLM(LlamaForCausalLM):
    layer_class = Qwen2MoeLayer
