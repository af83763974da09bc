"""Experts of 4 or 8 bits a weight in groups (GPTQ, AWQ, compressed-tensors) on CUDA: all of a layer are multiplied in
one launch. Made by `quantization.experts`.

T rows, k experts a row, H hidden size, F width of an expert, E experts here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shoal.kernels import packed_experts
from shoal.kernels.packed_experts import PackedExpertWeight
from shoal.log import get_logger
from shoal.quantization.base import ExpertsMethod, ExpertsSpec, ExpertTensor, QuantizationScheme
from shoal.quantization.experts import linears_alike
from shoal.quantization.grouped_experts import GroupedExperts
from shoal.quantization.looped_experts import LoopedExperts, down_spec, expert_tensors, gate_up_spec
from shoal.quantization.packed_cuda import packed_weight
from shoal.quantization.packed_int import PackedIntLinear, exact_scales

_logger = get_logger(__name__)


class PackedExperts(GroupedExperts):
    """Each expert is loaded and checked as two linear layers, and packed into its place of the whole."""

    products = packed_experts

    def __init__(self, spec: ExpertsSpec, scheme: QuantizationScheme) -> None:
        super().__init__(spec)
        self._linears: list[list[PackedIntLinear]] = []
        for make in (gate_up_spec, down_spec):
            methods: list[PackedIntLinear] = []
            for method in linears_alike(spec, scheme, make):
                assert isinstance(method, PackedIntLinear)
                methods.append(method)
            self._linears.append(methods)

    def tensors(self) -> list[ExpertTensor]:
        return expert_tensors(*self._linears)

    def as_loaded(self) -> ExpertsMethod:
        """Inputs in another order are another one for each expert, which `LoopedExperts` can have."""
        gate_ups, downs = self._linears
        odd = next((method for method in (*gate_ups, *downs) if not method.is_in_order()), None)
        if odd is None:
            return self
        _logger.warning(
            "%s: g_idx orders the inputs, which quantization_config does not tell by desc_act; so this layer's experts "
            "are multiplied one by one, and without CUDA graphs",
            odd.name,
        )
        return LoopedExperts(self.spec, gate_ups, downs)

    def process_after_load(self) -> None:
        gate_ups, downs = self._linears
        del self._linears
        self.gate_up = _stacked(gate_ups, self.gating)
        self.down = _stacked(downs, {})

    @property
    def leading(self) -> PackedExpertWeight:
        """One whose groups are smaller than a slab, if any is: tiles of larger ones do not suit it. Ranks may have cut
        the groups of `down`, and a slab is of fewer inputs where they have more bits."""
        matrix: PackedExpertWeight = min(self.gate_up, self.down, key=lambda product: product.has_whole_slabs)
        return matrix

    def weight_bytes(self) -> int:
        held = [(matrix.words, matrix.scales, matrix.zeros, matrix.bias) for matrix in (self.gate_up, self.down)]
        return sum(tensor.nbytes for tensors in held for tensor in tensors if tensor is not None)


def _stacked(methods: Sequence[PackedIntLinear], gating: dict[str, Any]) -> PackedExpertWeight:
    """All experts of a product. Raises ModelError for what no weight is."""
    words: torch.Tensor | None = None
    scales, zeros, packed = [], [], None
    for expert, method in enumerate(methods):
        (matrix,) = method.checked_matrices()
        packed = packed_weight(matrix)
        del matrix  # and with it the form that was loaded
        if words is None:
            words = torch.empty(len(methods), *packed.words.shape, dtype=torch.int32, device=packed.words.device)
        words[expert] = packed.words
        scales.append(packed.scales.float())
        zeros.append(packed.zeros)
    assert words is not None and packed is not None
    own_zeros = None
    if any(zero is not None for zero in zeros):
        middle = torch.full_like(scales[0], 1 << (packed.bits - 1), dtype=torch.uint8)
        own_zeros = torch.stack([middle if zero is None else zero for zero in zeros])
    biases = [method.bias for method in methods if method.bias is not None]
    return PackedExpertWeight(
        words=words,
        scales=exact_scales(torch.stack(scales)),
        zeros=own_zeros,
        bits=packed.bits,
        group_size=packed.group_size,
        num_inputs=packed.num_inputs,
        bias=torch.stack(biases) if biases else None,
        **gating,
    )
