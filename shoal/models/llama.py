"""Llama (Touvron et al. 2023) and Mistral's dense form (Jiang et al. 2023); Qwen2 and Qwen3 build on these classes.

T tokens, H hidden size, Hq query heads, Hk KV heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn

from shoal.attention.base import AttentionMetadata
from shoal.config.graph_sizes import OVERLAP_TOKENS
from shoal.config.model_config import ModelConfig
from shoal.layers.activation import GatedActivation
from shoal.layers.attention import RotaryAttention
from shoal.layers.context import BuildContext
from shoal.layers.embedding import LogitsHead, VocabularyEmbedding
from shoal.layers.linear import GateUpLinear, QKVLinear, RowLinear
from shoal.layers.moe import MixtureOfExperts
from shoal.layers.norm import RMSNorm
from shoal.layers.rotary import Angles, RotaryEmbedding
from shoal.models.base import CausalLM, LayerObserver
from shoal.models.halves import Half


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    # In the checkpoint: of each matrix, or of the one in which they stand one above the other.
    qkv_names: str | tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    # Whether a norm follows that adds to the residual stream: it sums over the ranks, too.
    leaves_sum = True

    def __init__(
        self, config: ModelConfig, context: BuildContext, prefix: str, window: int | None, rotary: RotaryEmbedding
    ) -> None:
        super().__init__()
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.qkv_proj = QKVLinear(
            context,
            prefix,
            config.hidden_size,
            heads,
            kv_heads,
            config.head_dim,
            bias=self.has_qkv_bias(config),
            names=self.qkv_names,
        )
        bias = self.has_output_bias(config)
        self.o_proj = RowLinear(
            context,
            f"{prefix}.o_proj",
            heads * config.head_dim,
            config.hidden_size,
            bias=bias,
            leaves_sum=self.leaves_sum and not bias,
        )
        kv_slice = context.parallel.kv_head_slice(kv_heads)
        self.attention = RotaryAttention(
            context,
            config.head_dim,
            window,
            num_heads=heads // context.parallel.tensor_size,
            num_kv_heads=kv_slice.stop - kv_slice.start,
            rotary=rotary,
            name=prefix,
            scale=self.scale(config),
            softcap=self.softcap(config),
            sinks=self.make_sinks(config, context, prefix),
            **self.head_norms(config, context, prefix),
        )

    def scale(self, config: ModelConfig) -> float | None:
        """Of query times key; None: D ** -0.5."""
        return None

    def softcap(self, config: ModelConfig) -> float | None:
        return None

    def make_sinks(self, config: ModelConfig, context: BuildContext, prefix: str) -> torch.Tensor | None:
        """As of `AttentionForm`: fp32 [Hq], filled by the loader."""
        return None

    def has_qkv_bias(self, config: ModelConfig) -> bool:
        return config.attention_bias

    def has_output_bias(self, config: ModelConfig) -> bool:
        return config.attention_bias

    def head_norms(self, config: ModelConfig, context: BuildContext, prefix: str) -> dict[str, RMSNorm]:
        """query_norm and key_norm, of models that have them."""
        return {}

    def forward(
        self,
        hidden: torch.Tensor,
        angles: Angles,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden [T, H] -> [T, H], or [R, H] of the tokens `rows`: this rank's summand where o_proj leaves the sum to
        the norm that follows."""
        heads = self.attend(self.qkv_proj(hidden), angles, kv_cache, metadata)
        return self.o_proj(heads if rows is None else heads.index_select(0, rows))

    def attend(
        self, projected: torch.Tensor, angles: Angles, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """projected [T, (Hq + 2 Hk) * D] -> [T, Hq * D]: what lies between the two products."""
        return self.attention.forward_projected(projected, angles, kv_cache, metadata)


class LlamaMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    gate_up_names: str | tuple[str, ...] = ("gate_proj", "up_proj")
    # As of attention.
    hands_sum_on = True

    def __init__(self, config: ModelConfig, context: BuildContext, prefix: str) -> None:
        super().__init__()
        hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
        bias = self.has_bias(config)
        # A layer's norm takes the MLP of the layer before, which may be experts: in deterministic mode these sum alone.
        sums_alone = context.deterministic and config.experts is not None
        self.activation = GatedActivation(context, config.hidden_act)
        self.gate_up_proj = GateUpLinear(
            context, prefix, hidden_size, intermediate_size, bias=bias, names=self.gate_up_names
        )
        self.down_proj = RowLinear(
            context,
            f"{prefix}.down_proj",
            intermediate_size,
            hidden_size,
            bias=bias,
            leaves_sum=self.hands_sum_on and not bias and not sums_alone,
        )

    def has_bias(self, config: ModelConfig) -> bool:
        return bool(config.raw.get("mlp_bias", False))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, H] -> [T, H], this rank's summand where `leaves_sum`."""
        return self.down_proj(self.gate_up_proj.gated(hidden, self.activation))

    @property
    def leaves_sum(self) -> bool:
        return self.down_proj.leaves_sum

    def sum_ranks(self, summand: torch.Tensor) -> torch.Tensor:
        """As of a RowLinear."""
        return self.down_proj.sum_ranks(summand)

    @property
    def can_start_sum(self) -> bool:
        return self.down_proj.can_start_sum

    def forward_few(self, stream: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """stream [T, H], T up to `few_rows` -> the stream after norm and MLP."""
        return self.down_proj.fused(self.gate_up_proj.gated(stream, self.activation, norm=norm), residual=stream)

    @property
    def few_rows(self) -> int:
        if not self.activation.is_silu:
            return 0
        return min(self.gate_up_proj.method.fused_rows, self.down_proj.method.fused_rows)


class LlamaLayer(nn.Module):
    """Attention and MLP, each after a norm and around a residual stream."""

    attention_class = LlamaAttention
    mlp_class = LlamaMLP
    norm_class: type[RMSNorm] = RMSNorm

    def __init__(self, config: ModelConfig, context: BuildContext, index: int, rotary: RotaryEmbedding) -> None:
        super().__init__()
        prefix = f"model.layers.{index}"
        self.self_attn = self.attention_class(
            config, context, f"{prefix}.self_attn", config.sliding_windows[index], rotary
        )
        self.mlp = self.make_mlp(config, context, index)
        size, eps = config.hidden_size, config.norm_eps
        # Each norm follows a row-parallel product: the MLP's of the layer before, or the attention's of this one.
        self.input_layernorm = self.norm_class(
            context, f"{prefix}.input_layernorm", size, eps, sums_ranks=self.mlp.leaves_sum
        )
        self.post_attention_layernorm = self.norm_class(
            context, f"{prefix}.post_attention_layernorm", size, eps, sums_ranks=self.self_attn.o_proj.leaves_sum
        )

    def make_mlp(self, config: ModelConfig, context: BuildContext, index: int) -> LlamaMLP | MixtureOfExperts:
        return self.mlp_class(config, context, f"model.layers.{index}.mlp")

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        angles: Angles,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden: what is still to be added to the residual stream, by whoever takes the two; so what is returned, of
        all tokens or of `rows`: others leave their keys and values, and are not computed further."""
        hidden, residual = self.input_layernorm.add_and_norm(hidden, residual)
        hidden = self.self_attn(hidden, angles, kv_cache, metadata, rows)
        if rows is not None:
            residual = residual.index_select(0, rows)
        hidden, residual = self.post_attention_layernorm.add_and_norm(hidden, residual)
        return self.mlp(hidden), residual

    def forward_halves(self, halves: Sequence[Half], kv_cache: torch.Tensor, next_norm: RMSNorm | None) -> None:
        """The same for a step of many tokens on several ranks, in two halves: while the ranks sum one of them, they
        compute the other. Tokens of the second see keys of the first, not the other way round.

        next_norm: what takes the stream after this layer; None where this stage has no more of them.
        """
        for half in halves:
            hidden = half.take(self.input_layernorm)
            angles = half.angles[self.self_attn.attention.rotary]
            half.start_sum(self.self_attn(hidden, angles, kv_cache, half.metadata), self.post_attention_layernorm)
        for half in halves:
            half.start_sum(self.mlp(half.take(self.post_attention_layernorm)), next_norm)

    @property
    def takes_halves(self) -> bool:
        """Whether there is such a form of the layer."""
        causal = not self.self_attn.attention.backend.sees_both_ways
        return causal and self.self_attn.o_proj.can_start_sum and self.mlp.can_start_sum

    def forward_few(
        self, stream: torch.Tensor, angles: Angles, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """The same for up to `few_rows` rows: each product normalises what it takes, or adds the stream to what it
        gives. stream [T, H] -> the stream after this layer."""
        attention = self.self_attn
        projected = attention.qkv_proj.fused(stream, norm=self.input_layernorm)
        heads = attention.attend(projected, angles, kv_cache, metadata)
        stream = attention.o_proj.fused(heads, residual=stream)
        return self.mlp.forward_few(stream, self.post_attention_layernorm)

    @functools.cached_property
    def few_rows(self) -> int:
        """0 where the layer has no such form: its ranks share the sums, or its weights are held otherwise."""
        attention = self.self_attn
        if attention.o_proj.is_split:
            return 0
        return min(attention.qkv_proj.method.fused_rows, attention.o_proj.method.fused_rows, self.mlp.few_rows)


class LlamaForCausalLM(CausalLM):
    layer_class = LlamaLayer

    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__(config, context)
        # Adapters go by tokens of the step.
        self._may_drop_tokens = context.adapters is None
        num_positions = context.max_model_len or config.max_position_embeddings
        self.rotaries = self.make_rotaries(config, num_positions, context.device)
        tied = config.tie_word_embeddings
        if self.is_first_stage:
            self.embed_tokens = VocabularyEmbedding(
                context, "model.embed_tokens", config.vocab_size, config.hidden_size
            )
        self.layers = nn.ModuleList(
            self.layer_class(config, context, index, self.rotary_of(config, index)) for index in self.layer_range
        )
        if self.is_last_stage:
            sums_ranks = self.layers[-1].mlp.leaves_sum
            self.norm = self.layer_class.norm_class(
                context, "model.norm", config.hidden_size, config.norm_eps, sums_ranks=sums_ranks
            )
            self.lm_head = LogitsHead(
                context,
                "model.embed_tokens" if tied else "lm_head",
                config.vocab_size,
                config.hidden_size,
                self.embed_tokens if tied and self.is_first_stage else None,
                softcap=self.logits_softcap(config),
            )

    def make_rotaries(
        self, config: ModelConfig, num_positions: int, device: torch.device
    ) -> tuple[RotaryEmbedding, ...]:
        """By what heads turn: one for all layers, or one for each kind of them (`rotary_of`)."""
        assert config.rope is not None
        return (RotaryEmbedding(config.rope, config.head_dim, num_positions, device),)

    def rotary_of(self, config: ModelConfig, index: int) -> RotaryEmbedding:
        return self.rotaries[0]

    def logits_softcap(self, config: ModelConfig) -> float | None:
        return None

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [T] -> [T, H]."""
        return self.embed_tokens(token_ids)

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
            hidden = self.embed(token_ids)
        residual = None
        lookups = {rotary: rotary.lookup(positions) for rotary in self.rotaries}
        few = hidden.shape[0] <= self.few_rows
        # The layer that goes on with the rows alone; it is never computed in halves.
        dropping = self.layers[-1] if rows is not None and self._may_drop_tokens and not few else None
        halves: list[Half] = []
        # A step whose sequences only the device knows is a CUDA graph.
        if hidden.shape[0] >= OVERLAP_TOKENS and self.takes_halves and metadata.query_lens:
            parts = hidden.chunk(2)
            if self.layers[0] is not dropping and self.layers[0].self_attn.o_proj.group.overlaps(parts[0]):
                halves = self._halves(parts, positions, metadata)
        for index, layer, kv_cache in zip(self.layer_range, self.layers, kv_caches, strict=True):
            if hooks is not None:
                hooks.before_layer(index, kv_cache, metadata)
            angles = lookups[layer.self_attn.attention.rotary]
            if few:
                hidden = layer.forward_few(hidden, angles, kv_cache, metadata)
            elif halves and layer is not dropping:
                layer.forward_halves(halves, kv_cache, self._norm_behind(index, dropping))
            else:
                if halves:
                    hidden, halves = torch.cat([half.take_stream() for half in halves]), []
                kept = rows if layer is dropping else None
                hidden, residual = layer(hidden, residual, angles, kv_cache, metadata, kept)
            if hooks is not None:
                hooks.after_layer(index, kv_cache, metadata)
        if halves:
            hidden = torch.cat([half.take(self.norm) if self.is_last_stage else half.take_stream() for half in halves])
        elif self.is_last_stage:
            hidden = self.norm.add_and_norm(hidden, residual)[0]
        elif not few:
            hidden = self.layers[-1].mlp.sum_ranks(hidden) + residual
        if rows is not None and dropping is None:
            hidden = hidden.index_select(0, rows)
        return hidden

    @functools.cached_property
    def few_rows(self) -> int:
        return min(layer.few_rows for layer in self.layers)

    @functools.cached_property
    def takes_halves(self) -> bool:
        return all(layer.takes_halves for layer in self.layers)

    def _halves(
        self, parts: Sequence[torch.Tensor], positions: torch.Tensor, metadata: AttentionMetadata
    ) -> list[Half]:
        """parts of the stream [T / 2, H]."""
        attention = self.layers[0].self_attn
        halves = []
        first = parts[0].shape[0]
        for part, own, places in zip(parts, metadata.split(first), positions.split(first), strict=True):
            attention.attention.backend.prepare(own)
            lookups = {rotary: rotary.lookup(places) for rotary in self.rotaries}
            halves.append(Half(part, attention.o_proj.group, own, lookups))
        return halves

    def _norm_behind(self, index: int, dropping: LlamaLayer | None) -> RMSNorm | None:
        """The norm that takes the halves after layer `index`. None where their stream is taken as it is: at the end of
        a stage that is not the last, and before the layer `dropping`."""
        if index + 1 in self.layer_range:
            following = self.layers[index + 1 - self.layer_range[0]]
            return None if following is dropping else following.input_layernorm
        return self.norm if self.is_last_stage else None

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)

    def project_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head.project(hidden)


class MistralForCausalLM(LlamaForCausalLM):
    """Llama whose layers see a sliding window; the config holds it for each layer."""
