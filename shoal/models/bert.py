"""BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019) and XLM-RoBERTa (Conneau et al. 2020): encoders of texts.

They have no head for tokens: `pooler` says what is made of the states. A token of a text's second segment comes with
its id raised by the size of the vocabulary. T tokens of a step, H hidden size, V size of the vocabulary.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from shoal.attention.base import AttentionMetadata
from shoal.config.families.bert import position_offset
from shoal.config.model_config import ModelConfig
from shoal.errors import ModelError
from shoal.layers.activation import activation
from shoal.layers.attention import Attention
from shoal.layers.context import BuildContext
from shoal.layers.embedding import Embedding, VocabularyEmbedding
from shoal.layers.linear import ColumnLinear, QKVLinear, RowLinear
from shoal.layers.norm import LayerNorm
from shoal.models.base import CausalLM, LayerObserver

# What a model of another purpose has before the names of the encoder, and how TensorFlow called weights of norms.
_PREFIX = re.compile(r"^(bert|roberta)\.")
_OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
# Beside the encoder, for other purposes: masked words, next sentences, a pooler that embeddings do without.
_UNUSED = ("embeddings.position_ids", "pooler.", "cls.", "lm_head.")


class BertLayer(nn.Module):
    """Attention and MLP, each with a norm behind the residual sum."""

    def __init__(self, config: ModelConfig, context: BuildContext, index: int) -> None:
        super().__init__()
        prefix, size, eps = f"layers.{index}", config.hidden_size, config.norm_eps
        self.head_dim = config.head_dim
        self.activation = activation(config.hidden_act)
        self.qkv = QKVLinear(
            context, f"{prefix}.attention.self", size, config.num_heads, config.num_heads, config.head_dim, bias=True,
            names=("query", "key", "value"),
        )  # fmt: skip
        self.attention = Attention(context, config.head_dim, sliding_window=None)
        self.output = RowLinear(context, f"{prefix}.attention.output.dense", size, size, bias=True)
        self.attention_norm = LayerNorm(context, f"{prefix}.attention.output.LayerNorm", size, eps)
        self.up = ColumnLinear(context, f"{prefix}.intermediate.dense", size, config.intermediate_size, bias=True)
        self.down = RowLinear(context, f"{prefix}.output.dense", config.intermediate_size, size, bias=True)
        self.output_norm = LayerNorm(context, f"{prefix}.output.LayerNorm", size, eps)

    def forward(self, hidden: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        query, key, value = self.qkv(hidden).view(hidden.shape[0], -1, self.head_dim).chunk(3, dim=1)
        hidden = self.attention_norm(hidden + self.output(self.attention(query, key, value, kv_cache, metadata)))
        return self.output_norm(hidden + self.down(self.activation(self.up(hidden))))


class BertModel(CausalLM):
    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__(config, context)
        size = config.hidden_size
        if self.is_first_stage:
            self.first_position = position_offset(config.architecture, config.raw)
            self.num_types = int(config.raw.get("type_vocab_size", 2))
            num_positions = config.max_position_embeddings + self.first_position
            self.words = VocabularyEmbedding(context, "embeddings.word_embeddings", config.vocab_size, size)
            self.positions = Embedding(context, "embeddings.position_embeddings", num_positions, size)
            self.types = Embedding(context, "embeddings.token_type_embeddings", self.num_types, size)
            self.norm = LayerNorm(context, "embeddings.LayerNorm", size, config.norm_eps)
        self.layers = nn.ModuleList(BertLayer(config, context, index) for index in self.layer_range)

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
        return hidden if rows is None else hidden.index_select(0, rows)

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """token_ids, positions [T] -> [T, H]."""
        vocab_size = self.config.vocab_size
        hidden = self.words(token_ids % vocab_size) + self.types(token_ids // vocab_size)
        return self.norm(hidden + self.positions(positions + self.first_position))

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        raise ModelError(f"{self.config.architecture} has no head for tokens")

    def project_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.compute_logits(hidden)

    def tensor_name(self, stored: str) -> str:
        name = _PREFIX.sub("", stored).replace("encoder.layer.", "layers.")
        for theirs, ours in _OLD_NAMES:
            name = name.replace(theirs, ours)
        return name

    def expects_elsewhere(self, name: str) -> bool:
        return name.startswith(_UNUSED) or super().expects_elsewhere(name)
