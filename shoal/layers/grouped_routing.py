"""DeepSeek's routing: experts stand in groups, and a token's come from the best of them. Used by models/deepseek.py.

T tokens, E experts, G groups, k experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from shoal.config.families.deepseek import RoutingConfig
from shoal.layers.checkpoint import CheckpointTensor, whole
from shoal.layers.context import BuildContext
from shoal.layers.routing import sum_chosen, top_k


class GroupedTopK(nn.Module):
    """Scores by softmax over all experts (DeepSeek-V2, 2024) or by the sigmoid of each, which a correction learned
    without a loss shifts for the choice, not for the weights (DeepSeek-V3, 2024)."""

    def __init__(self, context: BuildContext, correction: str, config: RoutingConfig, num_experts: int, k: int) -> None:
        """correction: its name in the checkpoint, where the config says there is one."""
        super().__init__()
        self.config, self.num_chosen, self._name = config, k, correction
        self.correction: torch.Tensor | None = None
        if config.has_correction:
            # Differences between experts are smaller than bf16 can tell.
            self.correction = torch.empty(num_experts, dtype=torch.float32, device=context.device)

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [T, E] -> (weights fp32 [T, k], ids int64 [T, k])."""
        config, logits = self.config, logits.float()
        # Written out, the sigmoid of a number has the same bits wherever it stands in the tensor.
        scores = logits.softmax(dim=-1) if config.scores == "softmax" else 1.0 / (1.0 + (-logits).exp())
        choice = scores if self.correction is None else scores + self.correction
        if config.num_groups > 1:
            choice = choice.masked_fill(self._outside(choice), float("-inf"))
        _, ids = top_k(choice, self.num_chosen)
        weights = scores.gather(1, ids)
        if config.normalize:
            weights = weights / (sum_chosen(weights) + 1e-20)
        return (weights if config.scale == 1.0 else weights * config.scale), ids

    def _outside(self, choice: torch.Tensor) -> torch.Tensor:
        """Whether an expert is in no chosen group [T, E]."""
        config = self.config
        groups = choice.view(choice.shape[0], config.num_groups, -1)
        best, _ = groups.sort(dim=-1, descending=True)
        worth = best[..., 0]
        for index in range(1, config.group_width):
            worth = worth + best[..., index]
        _, chosen = top_k(worth, config.num_chosen_groups)
        outside = torch.ones_like(worth, dtype=torch.bool).scatter(1, chosen, False)
        return outside.unsqueeze(-1).expand_as(groups).reshape(choice.shape)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        if self.correction is not None:
            yield whole(self._name, self.correction, "bias")

    def process_after_load(self) -> None:
        return None

    def weight_bytes(self) -> int:
        return 0 if self.correction is None else self.correction.nbytes
