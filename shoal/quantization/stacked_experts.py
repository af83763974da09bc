"""Experts with plain weights on CUDA: stacked, and multiplied in one launch for all. Made by `Unquantized`.

T rows, k experts a row, H hidden size, F width of an expert, E experts here.
"""

from __future__ import annotations

import torch

from shoal.kernels.compile_ahead import is_compiling_ahead
from shoal.kernels.moe import (
    KINDS,
    PLAIN,
    ExpertWeight,
    GroupedTiles,
    choose_tiles,
    combine,
    every_tiles,
    few_down,
    few_up,
    grouped_matmul,
)
from shoal.kernels.moe_routing import order_pairs
from shoal.quantization.base import ExpertsMethod, ExpertsSpec, ExpertTensor, LinearTensor

# Up to so many rows each is multiplied for itself.
FEW_ROWS = 4


class StackedExperts(ExpertsMethod):
    """weights [E, 2 F, H] and [E, H, F], as they are in the checkpoint. In deterministic mode always the grouped
    product, whose bits depend on nothing but the row."""

    follows_device = True

    def __init__(self, spec: ExpertsSpec) -> None:
        super().__init__(spec)
        E, F, H = spec.num_experts, spec.intermediate_size, spec.hidden_size
        kind = KINDS.get(spec.activation.kind, PLAIN)
        # What the kernels do not know stands between the products.
        self._is_fused = kind != PLAIN

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=spec.dtype, device=spec.device)

        self.gate_up = ExpertWeight(
            empty(E, 2 * F, H),
            empty(E, 2 * F) if spec.gate_up_bias else None,
            kind,
            spec.interleaved,
            spec.activation.alpha,
            spec.activation.limit,
        )
        self.down = ExpertWeight(empty(E, H, F), empty(E, H) if spec.down_bias else None)

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

    def apply(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        spec = self.spec
        if x.shape[0] <= FEW_ROWS and self._is_fused and not spec.deterministic:
            x, ids, weights = x if x.stride(1) == 1 else x.contiguous(), ids.contiguous(), weights.contiguous()
            return few_down(few_up(x, self.gate_up, ids, self.tokens), self.down, ids, weights)
        dtype = torch.float32 if spec.deterministic else x.dtype
        pairs = self._grouped(x, ids, dtype)
        return combine(pairs, weights.contiguous(), ids.contiguous(), spec.num_experts, x.dtype)

    def apply_pairs(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        pairs = self._grouped(x, ids, torch.float32).view(*ids.shape, -1)
        return pairs.masked_fill_((ids < 0).unsqueeze(-1), 0.0)

    def _grouped(self, x: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[T * k, H] of `dtype`; of pairs without an expert here anything."""
        x = x if x.stride(1) == 1 else x.contiguous()
        num_pairs = ids.numel()
        if is_compiling_ahead():  # no step is to wait for tiles that no warm-up happens to choose
            for tiles in every_tiles(x.dtype, x.device):
                self._multiply(x, ids, tiles, dtype)
        return self._multiply(x, ids, choose_tiles(num_pairs, self.spec.num_experts, x.dtype, x.device), dtype)

    def _multiply(self, x: torch.Tensor, ids: torch.Tensor, tiles: GroupedTiles, dtype: torch.dtype) -> torch.Tensor:
        num_chosen, num_pairs = ids.shape[1], ids.numel()
        order = order_pairs(ids, self.tokens, tiles.block_m)
        hidden = grouped_matmul(x, self.gate_up, order, num_pairs, num_chosen, tiles)
        if not self._is_fused:
            hidden = self.spec.activation.apply(hidden)
        return grouped_matmul(hidden, self.down, order, num_pairs, 1, tiles, output_dtype=dtype)

    def weight_bytes(self) -> int:
        tensors = (self.gate_up.weight, self.gate_up.bias, self.down.weight, self.down.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)
