"""Experts of a Transformers model: its router chooses by its own code, and our RoutedExperts multiply.

T tokens, k experts a token, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.core_model_loading import WeightConverter

from shoal.config.model_config import ModelConfig
from shoal.config.transformers_experts import experts_refusal, experts_shape
from shoal.errors import ConfigError, ModelError
from shoal.layers.context import BuildContext
from shoal.layers.moe import ExpertNames, RoutedExperts, expert_activation

# How a conversion calls the matrix of one expert: `mlp.experts.*.gate_proj.weight`.
_ONE_EXPERT = re.compile(r"experts\.\*\.([\w.]+)\.weight$")


class Experts(nn.Module):
    """Stands for a module of experts, and is called as it is."""

    def __init__(self, experts: RoutedExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [..., H], top_k_index and top_k_weights [T, k] -> as hidden_states."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        summand = self.experts(rows, top_k_weights.float(), top_k_index)
        return self.experts.sum_ranks(summand).view(hidden_states.shape)


def make_experts(
    name: str, module: Any, converters: Sequence[WeightConverter], config: ModelConfig, context: BuildContext
) -> Experts:
    """What stands for `module`, which is called `name`. Raises ModelError, ConfigError."""
    what = f"architecture {config.architecture}"
    if (reason := experts_refusal(module)) is not None:
        raise ModelError(f"{what} has experts ({name}) that cannot be served through Transformers: {reason}")
    if context.deterministic:
        raise ConfigError(
            f"deterministic mode: {what} chooses experts by its own code in Transformers, which does not treat a token "
            "alike whatever is beside it; use --no-deterministic"
        )
    if type(module.act_fn) is not type(ACT2FN[config.hidden_act]):
        found = type(module.act_fn).__name__
        raise ModelError(f"{what}: its experts ({name}) use {found}, where its config says {config.hidden_act!r}")
    num_experts, hidden_size, width = experts_shape(module)
    return Experts(
        RoutedExperts(
            context,
            name,
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=width,
            activation=expert_activation(context, config.hidden_act),
            names=_names(name, converters, what),
        )
    )


def _names(name: str, converters: Sequence[WeightConverter], what: str) -> ExpertNames:
    """As checkpoints have them: what Transformers would stack, or one tensor where it converts nothing."""
    stored = {}
    for matrix in ("gate_up_proj", "down_proj"):
        sources = [
            source
            for converter in converters
            if any(f"{name}.{matrix}".endswith(target.lstrip(".")) for target in converter.target_patterns)
            for source in converter.source_patterns
        ]
        found = [_ONE_EXPERT.search(source) for source in sources]
        if not all(found):
            raise ModelError(f"{what}: its checkpoints store experts ({name}) in a form that is not known: {sources}")
        stored[matrix] = tuple(match[1] for match in found if match is not None)
    gate_up, down = stored["gate_up_proj"], stored["down_proj"]
    if not gate_up and not down:
        return ExpertNames(gate_up=("gate_up_proj",), down="down_proj", is_stacked=True)
    if len(gate_up) not in (1, 2) or len(down) != 1:
        raise ModelError(
            f"{what}: its checkpoints store experts ({name}) as {(*gate_up, *down)}; two or three are known"
        )
    return ExpertNames(gate_up=gate_up, down=down[0])
