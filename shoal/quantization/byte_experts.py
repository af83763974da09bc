"""Experts of a byte a weight, FP8 (e4m3) or INT8, on CUDA: all of a layer are multiplied in one launch. Rows stay as
they are, weights are converted in registers. Made by `quantization.experts`.

T rows, k experts a row, H hidden size, F width of an expert, E experts here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shoal.kernels import moe
from shoal.kernels.expert_weights import ExpertWeight
from shoal.kernels.linear import FP8_AS_FP16, converts_fp8
from shoal.quantization.base import ExpertsSpec, ExpertTensor, QuantizationScheme
from shoal.quantization.byte_linear import ByteMethod
from shoal.quantization.experts import linears_alike
from shoal.quantization.grouped_experts import GroupedExperts
from shoal.quantization.looped_experts import down_spec, expert_tensors, gate_up_spec


class ByteExperts(GroupedExperts):
    """Each expert is loaded and checked as two linear layers, whose numbers are parts of one tensor from the start."""

    products = moe

    def __init__(self, spec: ExpertsSpec, scheme: QuantizationScheme) -> None:
        super().__init__(spec)
        self._numbers: list[torch.Tensor] = []
        self._linears: list[list[ByteMethod]] = []
        for make in (gate_up_spec, down_spec):
            methods: list[ByteMethod] = []
            for expert, method in enumerate(linears_alike(spec, scheme, make)):
                assert isinstance(method, ByteMethod)
                if not methods:
                    shape = (spec.num_experts, method.spec.out_features, method.spec.in_features)
                    self._numbers.append(torch.empty(shape, dtype=method.held[0], device=spec.device))
                method.numbers = self._numbers[-1][expert]
                methods.append(method)
            self._linears.append(methods)

    def tensors(self) -> list[ExpertTensor]:
        return expert_tensors(*self._linears)

    def process_after_load(self) -> None:
        (gate_ups, downs), (gate_up, down) = self._linears, self._numbers
        self.gate_up = _stacked(gate_ups, gate_up, self.gating)
        self.down = _stacked(downs, down, {})
        del self._linears, self._numbers

    def weight_bytes(self) -> int:
        held = [(matrix.weight, matrix.scales, matrix.bias) for matrix in (self.gate_up, self.down)]
        return sum(tensor.nbytes for tensors in held for tensor in tensors if tensor is not None)


def _stacked(methods: Sequence[ByteMethod], numbers: torch.Tensor, gating: dict[str, Any]) -> ExpertWeight:
    """All experts of a product. Raises ModelError for what no weight is."""
    weights = [method.weight() for method in methods]
    scales = torch.stack([weight.scales for weight in weights])
    if numbers.dtype is torch.float8_e4m3fn and not converts_fp8(numbers.device):
        numbers, scales = numbers.view(torch.uint8), scales / FP8_AS_FP16
    biases = [method.bias for method in methods if method.bias is not None]
    bias = torch.stack(biases) if biases else None
    return ExpertWeight(weight=numbers, bias=bias, scales=scales, block=weights[0].block, **gating)
