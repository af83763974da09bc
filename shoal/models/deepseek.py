"""DeepSeek-V2 and V3 (DeepSeek-AI 2024, 2024); R1, V3.1 and Kimi-K2 are V3. Latent attention, whose cache is one row a
token for all heads, and many small experts beside those that all tokens share; the first layers are dense.

The layers that predict further tokens (MTP) are left aside. T tokens, H hidden size, Hq query heads of this rank.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from shoal.attention.base import AttentionMetadata
from shoal.config.families.deepseek import latent_sizes, routing_config, turns_interleaved
from shoal.config.model_config import ModelConfig
from shoal.layers.context import BuildContext
from shoal.layers.grouped_routing import GroupedTopK
from shoal.layers.latent import AbsorbedUpProjection, RotaryLatentAttention
from shoal.layers.linear import ColumnLinear, Linear, Part, ReplicatedLinear, RowLinear
from shoal.layers.moe import MixtureOfExperts, RoutedExperts, Router, SharedExpert, expert_activation
from shoal.layers.norm import RMSNorm
from shoal.layers.rotary import Angles, RotaryEmbedding
from shoal.models.llama import LlamaForCausalLM, LlamaLayer, LlamaMLP

# Of the norms of latents, whatever the config says of the others.
_LATENT_EPS = 1e-6
_LAYER_NUMBER = re.compile(r"^model\.layers\.(\d+)\.")


class DeepseekAttention(nn.Module):
    """Every rank has the latents of all tokens, and some of the heads."""

    def __init__(
        self, config: ModelConfig, context: BuildContext, prefix: str, window: int | None, rotary: RotaryEmbedding
    ) -> None:
        super().__init__()
        assert config.rope is not None
        hidden_size, num_heads, bias = config.hidden_size, config.num_heads, config.attention_bias
        self.sizes = sizes = latent_sizes(config.raw)
        query_width = num_heads * sizes.query
        if sizes.query_rank is None:
            self.q_proj = ColumnLinear(context, f"{prefix}.q_proj", hidden_size, query_width, bias=False)
            self.kv_a_proj = ReplicatedLinear(
                context, f"{prefix}.kv_a_proj_with_mqa", hidden_size, sizes.cached, bias=bias
            )
        else:
            parts = [
                Part(f"{prefix}.{name}", width, slice(0, width))
                for name, width in (("q_a_proj", sizes.query_rank), ("kv_a_proj_with_mqa", sizes.cached))
            ]
            self.a_proj = Linear(
                context,
                in_features=hidden_size,
                parts=parts,
                bias=bias,
                is_replicated=context.parallel.tensor_size > 1,
            )
            self.q_a_layernorm = RMSNorm(context, f"{prefix}.q_a_layernorm", sizes.query_rank, _LATENT_EPS)
            self.q_b_proj = ColumnLinear(context, f"{prefix}.q_b_proj", sizes.query_rank, query_width, bias=False)
        self.kv_a_layernorm = RMSNorm(context, f"{prefix}.kv_a_layernorm", sizes.rank, _LATENT_EPS)
        self.kv_b_proj = AbsorbedUpProjection(context, f"{prefix}.kv_b_proj", num_heads, sizes)
        scale = sizes.query**-0.5 * config.rope.softmax_factor
        self.attention = RotaryLatentAttention(context, sizes.cached, sizes.rank, scale, rotary=rotary, name=prefix)
        self.o_proj = RowLinear(
            context, f"{prefix}.o_proj", num_heads * sizes.value, hidden_size, bias=bias, leaves_sum=not bias
        )

    def forward(
        self,
        hidden: torch.Tensor,
        angles: Angles,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As of LlamaAttention."""
        sizes = self.sizes
        query, compressed = self._project(hidden)
        query = query.view(hidden.shape[0], -1, sizes.query)
        plain, turning = query.split([sizes.plain, sizes.turning], dim=-1)
        latent, key_turning = compressed.split([sizes.rank, sizes.turning], dim=-1)
        attended = self.attention.forward_turned(
            self.kv_b_proj.absorb(plain),
            turning,
            self.kv_a_layernorm(latent.contiguous()),
            key_turning,
            angles,
            kv_cache,
            metadata,
        )
        if rows is not None:
            attended = attended.index_select(0, rows)
        return self.o_proj(self.kv_b_proj.to_values(attended))

    def _project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [T, Hq * (N + R)], and what is cached before norm and turn, [T, L + R]."""
        sizes = self.sizes
        if sizes.query_rank is None:
            return self.q_proj(hidden), self.kv_a_proj(hidden)
        query, compressed = self.a_proj(hidden).split([sizes.query_rank, sizes.cached], dim=-1)
        return self.q_b_proj(self.q_a_layernorm(query.contiguous())), compressed


class DeepseekLayer(LlamaLayer):
    attention_class = DeepseekAttention  # type: ignore[assignment]
    few_rows = 0
    takes_halves = False

    def make_mlp(self, config: ModelConfig, context: BuildContext, index: int) -> LlamaMLP | MixtureOfExperts:
        prefix, sizes = f"model.layers.{index}.mlp", config.experts
        if sizes is None or index not in sizes.layers:
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
                f"{prefix}.shared_experts",
                config.hidden_size,
                sizes.shared_size,
                config.hidden_act,
                leaves_sum=experts.leaves_sum,
            )
        # In fp32, as in training: experts that are close would change places.
        router = Router(context, f"{prefix}.gate", config.hidden_size, sizes.num_experts, dtype=torch.float32)
        routing = GroupedTopK(
            context,
            f"{prefix}.gate.e_score_correction_bias",
            routing_config(config.architecture, config.raw),
            sizes.num_experts,
            sizes.num_per_token,
        )
        return MixtureOfExperts(router, routing, experts, shared)


class DeepseekForCausalLM(LlamaForCausalLM):
    layer_class = DeepseekLayer

    def make_rotaries(
        self, config: ModelConfig, num_positions: int, device: torch.device
    ) -> tuple[RotaryEmbedding, ...]:
        assert config.rope is not None
        turning, interleaved = latent_sizes(config.raw).turning, turns_interleaved(config.raw)
        return (RotaryEmbedding(config.rope, turning, num_positions, device, interleaved=interleaved),)

    def expects_elsewhere(self, name: str) -> bool:
        number = _LAYER_NUMBER.match(name)
        past_end = -1 if number is None else int(number[1]) - self.config.num_layers
        num_further = self.config.raw.get("num_nextn_predict_layers") or 0
        return 0 <= past_end < num_further or super().expects_elsewhere(name)
