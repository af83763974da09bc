"""MXFP4 experts on CUDA: they stay in four bits, and all of a layer are multiplied in one launch. Made by `Mxfp4`.

T rows, k experts a row, H hidden size, F width of an expert, E experts here.
"""

from __future__ import annotations

from shoal.kernels import mxfp4
from shoal.kernels.mxfp4 import Mxfp4Weight
from shoal.quantization.base import ExpertsSpec, ExpertTensor
from shoal.quantization.grouped_experts import GroupedExperts
from shoal.quantization.mxfp4 import check_scales, empty_mxfp4, mxfp4_tensors


class Mxfp4CudaExperts(GroupedExperts):
    products = mxfp4

    def __init__(self, spec: ExpertsSpec) -> None:
        super().__init__(spec)
        experts, width, size = spec.num_experts, spec.intermediate_size, spec.hidden_size
        self._gate_up = empty_mxfp4(spec, 2 * width, size, spec.gate_up_bias, experts)
        self._down = empty_mxfp4(spec, size, width, spec.down_bias, experts)
        blocks, scales, bias = self._gate_up
        self.gate_up = Mxfp4Weight(blocks=blocks.flatten(2), scales=scales, bias=bias, **self.gating)
        blocks, scales, bias = self._down
        self.down = Mxfp4Weight(blocks=blocks.flatten(2), scales=scales, bias=bias)

    def tensors(self) -> list[ExpertTensor]:
        parts = (("gate_up", self._gate_up), ("down", self._down))
        return [
            ExpertTensor(part=part, tensor=tensor)  # type: ignore[arg-type]
            for part, held in parts
            for tensor in mxfp4_tensors(*held)
        ]

    def process_after_load(self) -> None:
        names = self.spec.gate_up_names[0] if self.spec.gate_up_names else ("gate_up",)
        check_scales(self.gate_up.scales, names)
        check_scales(self.down.scales, self.spec.down_names[:1] or ("down",))

    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._gate_up, *self._down) if tensor is not None)
