"""OPT (Zhang et al. 2022): learned positions, LayerNorm before or after each block, a plain MLP, biases everywhere.

The 350M form embeds in fewer dimensions than the layers have, projects in and out, and normalises after each block.
T tokens, H hidden size, E embedding size, W width of this rank's slice of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from shoal.attention.base import AttentionMetadata
from shoal.config.model_config import ModelConfig
from shoal.layers.activation import activation
from shoal.layers.attention import Attention
from shoal.layers.context import BuildContext
from shoal.layers.embedding import Embedding, LogitsHead, VocabularyEmbedding
from shoal.layers.linear import ColumnLinear, QKVLinear, ReplicatedLinear, RowLinear
from shoal.layers.norm import LayerNorm
from shoal.models.base import CausalLM, LayerObserver

# Rows 0 and 1 of the position table belonged to padding when the model was trained.
_POSITION_OFFSET = 2


class OPTAttention(nn.Module):
    def __init__(self, config: ModelConfig, context: BuildContext, prefix: str) -> None:
        super().__init__()
        size, self.head_dim = config.hidden_size, config.head_dim
        bias = config.attention_bias
        self.qkv_proj = QKVLinear(context, prefix, size, config.num_heads, config.num_heads, self.head_dim, bias=bias)
        self.out_proj = RowLinear(context, f"{prefix}.out_proj", size, size, bias=bias)
        self.attention = Attention(context, self.head_dim, sliding_window=None)

    def forward(self, hidden: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        heads = self.qkv_proj(hidden).view(hidden.shape[0], -1, self.head_dim)
        query, key, value = heads.chunk(3, dim=1)
        return self.out_proj(self.attention(query, key, value, kv_cache, metadata))


class OPTLayer(nn.Module):
    def __init__(self, config: ModelConfig, context: BuildContext, index: int) -> None:
        super().__init__()
        prefix, size = f"model.decoder.layers.{index}", config.hidden_size
        bias, affine = config.attention_bias, layer_norm_affine(config)
        self.norm_before = bool(config.raw.get("do_layer_norm_before", True))
        self.activation = activation(config.hidden_act, context.deterministic and context.device.type == "cpu")
        self.self_attn = OPTAttention(config, context, f"{prefix}.self_attn")
        self.self_attn_layer_norm = LayerNorm(
            context, f"{prefix}.self_attn_layer_norm", size, config.norm_eps, affine=affine
        )
        self.fc1 = ColumnLinear(context, f"{prefix}.fc1", size, config.intermediate_size, bias=bias)
        self.fc2 = RowLinear(context, f"{prefix}.fc2", config.intermediate_size, size, bias=bias)
        self.final_layer_norm = LayerNorm(context, f"{prefix}.final_layer_norm", size, config.norm_eps, affine=affine)

    def forward(self, hidden: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        if self.norm_before:
            hidden = hidden + self.self_attn(self.self_attn_layer_norm(hidden), kv_cache, metadata)
            return hidden + self.mlp(self.final_layer_norm(hidden))
        hidden = self.self_attn_layer_norm(hidden + self.self_attn(hidden, kv_cache, metadata))
        return self.final_layer_norm(hidden + self.mlp(hidden))

    def mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden)))


class OPTForCausalLM(CausalLM):
    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__(config, context)
        size, prefix = config.hidden_size, "model.decoder"
        embedding_size = int(config.raw.get("word_embed_proj_dim") or size)
        self.project_in = self.project_out = self.final_layer_norm = None
        if self.is_first_stage:
            self.embed_tokens = VocabularyEmbedding(
                context, f"{prefix}.embed_tokens", config.vocab_size, embedding_size
            )
            num_positions = config.max_position_embeddings + _POSITION_OFFSET
            self.embed_positions = Embedding(context, f"{prefix}.embed_positions", num_positions, size)
            if embedding_size != size:
                self.project_in = ReplicatedLinear(context, f"{prefix}.project_in", embedding_size, size, bias=False)
        self.layers = nn.ModuleList(OPTLayer(config, context, index) for index in self.layer_range)
        if self.is_last_stage:
            if config.raw.get("do_layer_norm_before", True) and not config.raw.get("_remove_final_layer_norm", False):
                self.final_layer_norm = LayerNorm(
                    context, f"{prefix}.final_layer_norm", size, config.norm_eps, affine=layer_norm_affine(config)
                )
            if embedding_size != size:
                self.project_out = ReplicatedLinear(context, f"{prefix}.project_out", size, embedding_size, bias=False)
            tied = config.tie_word_embeddings
            self.lm_head = LogitsHead(
                context,
                f"{prefix}.embed_tokens" if tied else "lm_head",
                config.vocab_size,
                embedding_size,
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
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if hidden is None:
            hidden = self.embed(token_ids, positions)
        for index, layer, kv_cache in zip(self.layer_range, self.layers, kv_caches, strict=True):
            if hooks is not None:
                hooks.before_layer(index, kv_cache, metadata)
            hidden = layer(hidden, kv_cache, metadata)
            if hooks is not None:
                hooks.after_layer(index, kv_cache, metadata)
        if rows is not None:
            hidden = hidden.index_select(0, rows)
        if self.final_layer_norm is not None:
            hidden = self.final_layer_norm(hidden)
        return hidden if self.project_out is None else self.project_out(hidden)

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """token_ids, positions [T] -> [T, H]."""
        hidden = self.embed_tokens(token_ids)
        if self.project_in is not None:
            hidden = self.project_in(hidden)
        return hidden + self.embed_positions(positions + _POSITION_OFFSET)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, H or E] -> logits [R, W], fp32."""
        return self.lm_head(hidden)

    def project_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head.project(hidden)


def layer_norm_affine(config: ModelConfig) -> bool:
    return bool(config.raw.get("layer_norm_elementwise_affine", True))
