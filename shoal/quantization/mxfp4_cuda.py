"""MXFP4 experts on CUDA: they stay in four bits, and all of a layer are multiplied in one launch. Made by `Mxfp4`.

T rows, k experts a row, H hidden size, F width of an expert, E experts here.
"""

from __future__ import annotations

import torch

from shoal.kernels.compile_ahead import is_compiling_ahead
from shoal.kernels.moe import KINDS, PLAIN, combine
from shoal.kernels.moe_routing import order_pairs
from shoal.kernels.mxfp4 import Mxfp4Weight, block_rows, few_down, few_up, grouped_matmul
from shoal.quantization.base import ExpertsMethod, ExpertsSpec, ExpertTensor
from shoal.quantization.mxfp4 import check_scales, empty_mxfp4, mxfp4_tensors

# Up to so many rows each is multiplied for itself.
FEW_ROWS = 4


class Mxfp4CudaExperts(ExpertsMethod):
    follows_device = True

    def __init__(self, spec: ExpertsSpec) -> None:
        super().__init__(spec)
        experts, width, size = spec.num_experts, spec.intermediate_size, spec.hidden_size
        kind = KINDS.get(spec.activation.kind, PLAIN)
        # What the kernels do not know stands between the products.
        self._is_fused = kind != PLAIN
        self._gate_up = empty_mxfp4(spec, 2 * width, size, spec.gate_up_bias, experts)
        self._down = empty_mxfp4(spec, size, width, spec.down_bias, experts)
        activation = spec.activation
        blocks, scales, bias = self._gate_up
        self.gate_up = Mxfp4Weight(
            blocks.flatten(2), scales, bias, kind, spec.interleaved, activation.alpha, activation.limit
        )
        blocks, scales, bias = self._down
        self.down = Mxfp4Weight(blocks.flatten(2), scales, bias)

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

    def apply(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        ids, weights = ids.contiguous(), weights.contiguous()
        if x.shape[0] <= FEW_ROWS and self._is_fused:
            return few_down(few_up(x, self.gate_up, ids, self.tokens), self.down, ids, weights)
        return combine(self._grouped(x, ids), weights, ids, self.spec.num_experts, x.dtype)

    def apply_pairs(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        pairs = self._grouped(x if x.stride(1) == 1 else x.contiguous(), ids.contiguous()).float()
        return pairs.view(*ids.shape, -1).masked_fill((ids < 0).unsqueeze(-1), 0.0)

    def _grouped(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """[T * k, H]; of pairs without an expert here anything."""
        if is_compiling_ahead():  # no step is to wait for blocks that no warm-up happens to choose
            for block_m in (16, 32, 64):
                self._multiply(x, ids, block_m)
        return self._multiply(x, ids, block_rows(ids.numel(), self.spec.num_experts))

    def _multiply(self, x: torch.Tensor, ids: torch.Tensor, block_m: int) -> torch.Tensor:
        num_pairs, num_chosen = ids.numel(), ids.shape[1]
        order = order_pairs(ids, self.tokens, block_m)
        hidden = grouped_matmul(x, self.gate_up, order, num_pairs, num_chosen, block_m)
        if not self._is_fused:
            hidden = self.spec.activation.apply(hidden)
        return grouped_matmul(hidden, self.down, order, num_pairs, 1, block_m)

    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._gate_up, *self._down) if tensor is not None)
