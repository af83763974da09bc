"""Llama (Touvron et al. 2023) and Mistral's dense form (Jiang et al. 2023); Qwen2 and Qwen3 build on these classes.

T tokens, H hidden size, Hq query heads, Hk KV heads, D head size.
"""

from __future__ import annotations

import torch
from torch import nn

from shoal.attention.base import AttentionMetadata
from shoal.config.model_config import ModelConfig
from shoal.layers.activation import activation, gated
from shoal.layers.attention import Attention
from shoal.layers.context import BuildContext
from shoal.layers.embedding import LogitsHead, VocabularyEmbedding
from shoal.layers.linear import GateUpLinear, QKVLinear, RowLinear
from shoal.layers.norm import RMSNorm
from shoal.layers.rotary import RotaryEmbedding
from shoal.models.base import CausalLM, LayerObserver

Angles = tuple[torch.Tensor, torch.Tensor]


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(
        self, config: ModelConfig, context: BuildContext, prefix: str, window: int | None, rotary: RotaryEmbedding
    ) -> None:
        super().__init__()
        self.rotary = rotary
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.qkv_proj = QKVLinear(
            context, prefix, config.hidden_size, heads, kv_heads, config.head_dim, bias=self.has_qkv_bias(config)
        )
        self.o_proj = RowLinear(
            context, f"{prefix}.o_proj", heads * config.head_dim, config.hidden_size, bias=self.has_output_bias(config)
        )
        self.num_heads = heads // context.parallel.tensor_size
        kv_slice = context.parallel.kv_head_slice(kv_heads)
        self.num_kv_heads = kv_slice.stop - kv_slice.start
        self.attention = Attention(context, config.head_dim, window)

    def has_qkv_bias(self, config: ModelConfig) -> bool:
        return config.attention_bias

    def has_output_bias(self, config: ModelConfig) -> bool:
        return config.attention_bias

    def forward(
        self, hidden: torch.Tensor, angles: Angles, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        heads = self.qkv_proj(hidden).view(hidden.shape[0], -1, self.head_dim)
        query_key, value = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        rotated = self.rotary.rotate(self.normalize(query_key), angles)
        query, key = rotated.split([self.num_heads, self.num_kv_heads], dim=1)
        return self.o_proj(self.attention(query, key, value, kv_cache, metadata))

    def normalize(self, query_key: torch.Tensor) -> torch.Tensor:
        """query_key [T, Hq + Hk, D], before the rotation: nothing in Llama."""
        return query_key


class LlamaMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, context: BuildContext, prefix: str) -> None:
        super().__init__()
        hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
        bias = bool(config.raw.get("mlp_bias", False))
        self.activation = activation(config.hidden_act, context.deterministic)
        self.gate_up_proj = GateUpLinear(context, prefix, hidden_size, intermediate_size, bias=bias)
        self.down_proj = RowLinear(context, f"{prefix}.down_proj", intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(gated(self.activation, self.gate_up_proj(hidden)))


class LlamaLayer(nn.Module):
    """Attention and MLP, each after a norm and around a residual stream."""

    attention_class = LlamaAttention

    def __init__(self, config: ModelConfig, context: BuildContext, index: int, rotary: RotaryEmbedding) -> None:
        super().__init__()
        prefix = f"model.layers.{index}"
        self.input_layernorm = RMSNorm(context, f"{prefix}.input_layernorm", config.hidden_size, config.norm_eps)
        self.self_attn = self.attention_class(
            config, context, f"{prefix}.self_attn", config.sliding_windows[index], rotary
        )
        self.post_attention_layernorm = RMSNorm(
            context, f"{prefix}.post_attention_layernorm", config.hidden_size, config.norm_eps
        )
        self.mlp = LlamaMLP(config, context, f"{prefix}.mlp")

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        angles: Angles,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what is still to be added to the residual stream, and the stream."""
        hidden, residual = self.input_layernorm.add_and_norm(hidden, residual)
        hidden = self.self_attn(hidden, angles, kv_cache, metadata)
        hidden, residual = self.post_attention_layernorm.add_and_norm(hidden, residual)
        return self.mlp(hidden), residual


class LlamaForCausalLM(CausalLM):
    layer_class = LlamaLayer

    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__(config, context)
        assert config.rope is not None
        num_positions = context.max_model_len or config.max_position_embeddings
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, num_positions, context.device)
        tied = config.tie_word_embeddings
        if self.is_first_stage:
            self.embed_tokens = VocabularyEmbedding(
                context, "model.embed_tokens", config.vocab_size, config.hidden_size
            )
        self.layers = nn.ModuleList(self.layer_class(config, context, index, self.rotary) for index in self.layer_range)
        if self.is_last_stage:
            self.norm = RMSNorm(context, "model.norm", config.hidden_size, config.norm_eps)
            self.lm_head = LogitsHead(
                context,
                "model.embed_tokens" if tied else "lm_head",
                config.vocab_size,
                config.hidden_size,
                self.embed_tokens if tied and self.is_first_stage else None,
            )

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        metadata: AttentionMetadata,
        hooks: LayerObserver | None = None,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if hidden is None:
            hidden = self.embed_tokens(token_ids)
        residual = None
        angles = self.rotary.lookup(positions)
        for index, layer, kv_cache in zip(self.layer_range, self.layers, kv_caches, strict=True):
            if hooks is not None:
                hooks.before_layer(index, kv_cache, metadata)
            hidden, residual = layer(hidden, residual, angles, kv_cache, metadata)
            if hooks is not None:
                hooks.after_layer(index, kv_cache, metadata)
        if not self.is_last_stage:
            return hidden + residual
        return self.norm.add_and_norm(hidden, residual)[0]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)


class MistralForCausalLM(LlamaForCausalLM):
    """Llama whose layers see a sliding window; the config holds it for each layer."""
