"""Experts as linear layers, two each, of whatever scheme the checkpoint has: on a CPU, and where there is no product
for several experts (see experts.py). The host sorts tokens by expert, so a GPU waits for it and a CUDA graph cannot
hold it.

T rows, k experts a row, H hidden size, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch

from shoal.quantization.base import (
    ExpertsMethod,
    ExpertsSpec,
    ExpertTensor,
    LinearMethod,
    LinearSpec,
    QuantizationScheme,
)


def gate_up_spec(spec: ExpertsSpec, expert: int) -> LinearSpec:
    """An expert's first product as a linear layer."""
    names = spec.gate_up_names[expert] if spec.gate_up_names else ()
    width = 2 * spec.intermediate_size
    return LinearSpec(
        in_features=spec.hidden_size,
        out_features=width,
        bias=spec.gate_up_bias,
        dtype=spec.dtype,
        device=spec.device,
        deterministic=spec.deterministic,
        names=names,
        part_sizes=(width // len(names),) * len(names) if names else (),
    )


def down_spec(spec: ExpertsSpec, expert: int) -> LinearSpec:
    """Its second one."""
    return LinearSpec(
        in_features=spec.intermediate_size,
        out_features=spec.hidden_size,
        bias=spec.down_bias,
        dtype=spec.dtype,
        device=spec.device,
        deterministic=spec.deterministic,
        num_input_shards=spec.num_input_shards,
        is_summand=spec.is_summand,
        all_in_features=spec.all_intermediate_size,
        in_start=spec.intermediate_start,
        names=(spec.down_names[expert],) if spec.down_names else (),
        part_sizes=(spec.hidden_size,) if spec.down_names else (),
    )


def expert_tensors(gate_ups: Sequence[LinearMethod], downs: Sequence[LinearMethod]) -> list[ExpertTensor]:
    """What the experts' linear layers read, one expert after the other."""
    found = []
    for expert, (gate_up, down) in enumerate(zip(gate_ups, downs, strict=True)):
        found += [ExpertTensor(part="gate_up", tensor=tensor, expert=expert) for tensor in gate_up.tensors()]
        found += [ExpertTensor(part="down", tensor=tensor, expert=expert) for tensor in down.tensors()]
    return found


class LoopedExperts(ExpertsMethod):
    """Each expert that has tokens multiplies them. Deterministic where the scheme's linear layers are."""

    def __init__(self, spec: ExpertsSpec, gate_ups: Sequence[LinearMethod], downs: Sequence[LinearMethod]) -> None:
        super().__init__(spec)
        self._gate_ups, self._downs = gate_ups, downs

    @classmethod
    def of(cls, spec: ExpertsSpec, scheme: QuantizationScheme) -> Self:
        """As the scheme makes them."""
        experts = range(spec.num_experts)
        gate_ups = [scheme.linear(gate_up_spec(spec, expert)) for expert in experts]
        return cls(spec, gate_ups, [scheme.linear(down_spec(spec, expert)) for expert in experts])

    def tensors(self) -> list[ExpertTensor]:
        return expert_tensors(self._gate_ups, self._downs)

    def process_after_load(self) -> None:
        for method in (*self._gate_ups, *self._downs):
            method.process_after_load()

    def apply_pairs(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        num_rows, num_chosen = ids.shape
        pairs = torch.zeros(num_rows * num_chosen, self.spec.hidden_size, dtype=torch.float32, device=x.device)
        flat = ids.flatten()
        # Experts count from 1 here: 0 are the pairs of other ranks.
        counts = torch.bincount(flat + 1, minlength=self.spec.num_experts + 1)
        self.tokens += counts[1:]
        own_pairs = flat.argsort(stable=True).split(counts.tolist())[1:]
        for expert, own in enumerate(own_pairs):
            if len(own):
                pairs[own] = self._apply_one(expert, x[own // num_chosen]).float()
        return pairs.view(num_rows, num_chosen, -1)

    def _apply_one(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """x [n, H] -> [n, H]."""
        spec, gate_up = self.spec, self._gate_ups[expert]
        hidden = None
        if spec.activation.kind == "silu" and not spec.interleaved and not spec.deterministic:
            hidden = gate_up.apply_gated(x)
        if hidden is None:
            hidden = spec.activation.apply(gate_up.apply(x))
        return self._downs[expert].apply(hidden)

    def weight_bytes(self) -> int:
        return sum(method.weight_bytes() for method in (*self._gate_ups, *self._downs))
