"""Experts on CUDA, stacked, and multiplied in one launch for all: what is the same however they are held.

T rows, k experts a row, H hidden size, F width of an expert, E experts here.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from shoal.kernels.compile_ahead import is_compiling_ahead
from shoal.kernels.expert_weights import KINDS, PLAIN, ExpertRows, GroupedTiles
from shoal.kernels.moe import combine
from shoal.kernels.moe_routing import order_pairs
from shoal.quantization.base import ExpertsMethod, ExpertsSpec

# Up to so many rows each is multiplied for itself.
FEW_ROWS = 4


class GroupedExperts(ExpertsMethod):
    """gate_up [E, 2 F, H] and down [E, H, F]: `ExpertRows` that `products` takes, a module with `few_up`, `few_down`
    and `grouped_matmul`. In deterministic mode always the grouped product."""

    follows_device = True
    products: ModuleType
    gate_up: Any
    down: Any

    def __init__(self, spec: ExpertsSpec) -> None:
        super().__init__(spec)
        activation = spec.activation
        kind = KINDS.get(activation.kind, PLAIN)
        # What the kernels do not know stands between the products.
        self._is_fused = kind != PLAIN
        # Of the first product's `ExpertRows`.
        self.gating: dict[str, Any] = {
            "kind": kind, "interleaved": spec.interleaved, "alpha": activation.alpha, "limit": activation.limit
        }  # fmt: skip

    @property
    def leading(self) -> ExpertRows:
        """The product whose tiles both are cut by."""
        matrix: ExpertRows = self.gate_up
        return matrix

    def apply(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        spec = self.spec
        x, weights, ids = x if x.stride(1) == 1 else x.contiguous(), weights.contiguous(), ids.contiguous()
        if x.shape[0] <= FEW_ROWS and self._is_fused and not spec.deterministic:
            hidden = self.products.few_up(x, self.gate_up, ids, self.tokens)
            output: torch.Tensor = self.products.few_down(hidden, self.down, ids, weights)
            return output
        pairs = self._grouped(x, ids, torch.float32 if spec.deterministic else x.dtype)
        return combine(pairs, weights, ids, spec.num_experts, x.dtype)

    def apply_pairs(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x, ids = x if x.stride(1) == 1 else x.contiguous(), ids.contiguous()
        pairs = self._grouped(x, ids, torch.float32).view(*ids.shape, -1)
        return pairs.masked_fill_((ids < 0).unsqueeze(-1), 0.0)

    def _grouped(self, x: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[T * k, H] of `dtype`; of pairs without an expert here anything."""
        if is_compiling_ahead():  # no step is to wait for tiles that no warm-up happens to choose
            for tiles in self.leading.every_tiles(x.dtype):
                self._multiply(x, ids, tiles, dtype)
        share = self.spec.num_experts / (self.spec.all_experts or self.spec.num_experts)
        return self._multiply(x, ids, self.leading.choose_tiles(ids.numel() * share, x.dtype), dtype)

    def _multiply(self, x: torch.Tensor, ids: torch.Tensor, tiles: GroupedTiles, dtype: torch.dtype) -> torch.Tensor:
        num_chosen, num_pairs = ids.shape[1], ids.numel()
        order = order_pairs(ids, self.tokens, tiles.block_m)
        multiply = self.products.grouped_matmul
        gate_up = self.gate_up.apart() if tiles.gates_apart else self.gate_up
        hidden = multiply(x, gate_up, order, num_pairs, num_chosen, tiles)
        if tiles.gates_apart or not self._is_fused:
            hidden = self.spec.activation.apply(hidden)
        output: torch.Tensor = multiply(hidden, self.down, order, num_pairs, 1, tiles, output_dtype=dtype)
        return output
