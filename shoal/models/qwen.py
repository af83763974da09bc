"""The first Qwen (Bai et al. 2023, arXiv:2309.16609): Llama with one matrix for query, key and value, and its biases.

Beyond the length that it was trained on, angles stretch (NTK, by a factor that steps up with the length) and queries
grow with the logarithm of their position. The factor is taken for max_model_len once and for all requests: keys in the
cache were turned by it. So with max_model_len up to `seq_length`, the default, everything is as it was trained.

T tokens, Hq heads, D head size.
"""

from __future__ import annotations

import math

import torch

from shoal.attention.base import AttentionMetadata
from shoal.config.model_config import ModelConfig
from shoal.layers.context import BuildContext
from shoal.layers.rotary import Angles, RotaryEmbedding
from shoal.models.llama import LlamaAttention, LlamaForCausalLM, LlamaLayer, LlamaMLP


class QwenAttention(LlamaAttention):
    qkv_names = "c_attn"

    def __init__(
        self, config: ModelConfig, context: BuildContext, prefix: str, window: int | None, rotary: RotaryEmbedding
    ) -> None:
        super().__init__(config, context, prefix, window, rotary)
        trained, longest = int(config.raw.get("seq_length", 8192)), rotary.table.shape[0]
        self.query_scales: torch.Tensor | None = None
        if config.raw.get("use_logn_attn", True) and longest > trained:
            positions = torch.arange(1, longest + 1, dtype=torch.float64)
            self.query_scales = (positions.log() / math.log(trained)).clamp(min=1).float().to(context.device)

    def has_output_bias(self, config: ModelConfig) -> bool:
        return not config.raw.get("no_bias", True)

    def attend(
        self, projected: torch.Tensor, angles: Angles, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        if self.query_scales is not None:  # before they turn: that commutes
            queries = projected[:, : self.attention.num_heads * self.attention.head_dim]
            queries.copy_(queries * self.query_scales.index_select(0, angles.positions)[:, None])
        return super().attend(projected, angles, kv_cache, metadata)


class QwenMLP(LlamaMLP):
    def has_bias(self, config: ModelConfig) -> bool:
        return not config.raw.get("no_bias", True)


class QwenLayer(LlamaLayer):
    attention_class = QwenAttention
    mlp_class = QwenMLP


class QwenForCausalLM(LlamaForCausalLM):
    layer_class = QwenLayer
    other_names = (
        ("transformer.wte.", "model.embed_tokens."),
        ("transformer.h.", "model.layers."),
        ("transformer.ln_f.", "model.norm."),
        (".ln_1.", ".input_layernorm."),
        (".ln_2.", ".post_attention_layernorm."),
        (".attn.c_proj.", ".self_attn.o_proj."),
        (".attn.c_attn.", ".self_attn.c_attn."),
        (".mlp.w2.", ".mlp.gate_proj."),
        (".mlp.w1.", ".mlp.up_proj."),
        (".mlp.c_proj.", ".mlp.down_proj."),
    )
