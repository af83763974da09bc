"""gpt-oss (OpenAI 2025): every other layer sees a window, each head has a sink that takes part of its attention to
nothing, and all MLPs are experts with biases and a clamped gate.

H hidden size, Hq query heads of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from shoal.config.families.gpt_oss import swiglu_numbers
from shoal.config.model_config import ModelConfig
from shoal.layers.checkpoint import CheckpointTensor
from shoal.layers.context import BuildContext
from shoal.layers.moe import ExpertNames, MixtureOfExperts, RoutedExperts, Router, clamped_swiglu
from shoal.layers.routing import SoftmaxTopK
from shoal.models.llama import LlamaAttention, LlamaForCausalLM, LlamaLayer

# One tensor for all experts of a layer, gate and up by turns.
_NAMES = ExpertNames(gate_up=("gate_up_proj",), down="down_proj", is_stacked=True, is_transposed=True)


class AttentionSinks(nn.Module):
    """The sinks of this rank's heads, fp32 [Hq]."""

    def __init__(self, context: BuildContext, name: str, num_heads: int) -> None:
        super().__init__()
        self.name, self.num_heads = name, num_heads
        self.own = context.parallel.tensor_slice(num_heads, "attention heads")
        self.logits = torch.empty(self.own.stop - self.own.start, dtype=torch.float32, device=context.device)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        yield CheckpointTensor(
            name=self.name, shape=(self.num_heads,), index=(self.own,), destination=self.logits, kind="bias"
        )

    def process_after_load(self) -> None:
        return None

    def weight_bytes(self) -> int:
        return self.logits.nbytes


class GptOssAttention(LlamaAttention):
    def make_sinks(self, config: ModelConfig, context: BuildContext, prefix: str) -> torch.Tensor:
        self.sinks = AttentionSinks(context, f"{prefix}.sinks", config.num_heads)
        return self.sinks.logits


class GptOssLayer(LlamaLayer):
    attention_class = GptOssAttention

    def make_mlp(self, config: ModelConfig, context: BuildContext, index: int) -> MixtureOfExperts:
        prefix, sizes = f"model.layers.{index}.mlp", config.experts
        assert sizes is not None
        alpha, limit = swiglu_numbers(config.raw)
        experts = RoutedExperts(
            context,
            f"{prefix}.experts",
            num_experts=sizes.num_experts,
            hidden_size=config.hidden_size,
            intermediate_size=sizes.intermediate_size,
            activation=clamped_swiglu(context, alpha=alpha, limit=limit, interleaved=True),
            names=_NAMES,
            interleaved=True,
            bias=True,
        )
        router = Router(context, f"{prefix}.router", config.hidden_size, sizes.num_experts, bias=True)
        return MixtureOfExperts(router, SoftmaxTopK(sizes.num_per_token, normalize=True), experts)


class GptOssForCausalLM(LlamaForCausalLM):
    layer_class = GptOssLayer
