"""Experts with plain weights on CUDA: stacked, and multiplied in one launch for all. Made by `Unquantized`.

T rows, k experts a row, H hidden size, F width of an expert, E experts here.
"""

from __future__ import annotations

import torch

from shoal.kernels import moe
from shoal.kernels.expert_weights import ExpertWeight
from shoal.quantization.base import ExpertsSpec, ExpertTensor, LinearTensor
from shoal.quantization.grouped_experts import GroupedExperts


class StackedExperts(GroupedExperts):
    """weights [E, 2 F, H] and [E, H, F], as they are in the checkpoint. In deterministic mode a row's bits depend on
    nothing but the row."""

    products = moe

    def __init__(self, spec: ExpertsSpec) -> None:
        super().__init__(spec)
        E, F, H = spec.num_experts, spec.intermediate_size, spec.hidden_size

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=spec.dtype, device=spec.device)

        self.gate_up = ExpertWeight(
            weight=empty(E, 2 * F, H), bias=empty(E, 2 * F) if spec.gate_up_bias else None, **self.gating
        )
        self.down = ExpertWeight(weight=empty(E, H, F), bias=empty(E, H) if spec.down_bias else None)

    def tensors(self) -> list[ExpertTensor]:
        found = []
        for part, matrix in (("gate_up", self.gate_up), ("down", self.down)):
            tensors = [LinearTensor(suffix="weight", data=matrix.weight, out_dim=0, in_dim=1)]
            if matrix.bias is not None:
                tensors.append(LinearTensor(suffix="bias", data=matrix.bias, out_dim=0, in_dim=None))
            found += [ExpertTensor(part=part, tensor=tensor) for tensor in tensors]  # type: ignore[arg-type]
        return found

    def process_after_load(self) -> None:
        return None

    def weight_bytes(self) -> int:
        tensors = (self.gate_up.weight, self.gate_up.bias, self.down.weight, self.down.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)
