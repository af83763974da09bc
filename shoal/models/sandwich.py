"""Layers that normalise what attention and MLP give, too, before it joins the residual stream: Gemma 2 and 3, GLM-4.

T tokens, H hidden size.
"""

from __future__ import annotations

import torch

from shoal.attention.base import AttentionMetadata
from shoal.config.model_config import ModelConfig
from shoal.layers.context import BuildContext
from shoal.layers.rotary import Angles, RotaryEmbedding
from shoal.models.llama import LlamaAttention, LlamaLayer, LlamaMLP


class SandwichAttention(LlamaAttention):
    leaves_sum = False


class SandwichMLP(LlamaMLP):
    hands_sum_on = False


class SandwichLayer(LlamaLayer):
    """norm_names: of the norms before and after attention, before and after the MLP."""

    attention_class = SandwichAttention
    mlp_class = SandwichMLP
    norm_names: tuple[str, str, str, str]
    few_rows = 0

    def __init__(self, config: ModelConfig, context: BuildContext, index: int, rotary: RotaryEmbedding) -> None:
        super().__init__(config, context, index, rotary)
        del self.input_layernorm, self.post_attention_layernorm
        names = [f"model.layers.{index}.{name}" for name in self.norm_names]
        norms = [self.norm_class(context, name, config.hidden_size, config.norm_eps) for name in names]
        self.before_attention, self.after_attention, self.before_mlp, self.after_mlp = norms

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        angles: Angles,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = self.before_attention.add_and_norm(hidden, residual)
        hidden = self.after_attention(self.self_attn(hidden, angles, kv_cache, metadata, rows))
        if rows is not None:
            residual = residual.index_select(0, rows)
        hidden, residual = self.before_mlp.add_and_norm(hidden, residual)
        return self.after_mlp(self.mlp(hidden)), residual
