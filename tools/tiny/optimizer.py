"""The optimizer: Muon for the matrices of the layers, AdamW for the embedding, norms and biases."""

from collections import defaultdict

import torch
from torch import Tensor, nn

MATRIX_RATE = 0.02
OTHER_RATE = 0.004


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al., 2024), all matrices of one shape at once."""

    def __init__(self, matrices: list[nn.Parameter], rate: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        by_shape = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        groups = [{"params": group} for group in by_shape.values()]
        super().__init__(groups, {"lr": rate, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix by its orthogonal update."""
        for group in self.param_groups:
            matrices = group["params"]
            gradient = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]
            average = state.setdefault("average", torch.zeros_like(gradient))
            average.lerp_(gradient, 1 - group["momentum"])
            update = orthogonal(gradient.lerp(average, group["momentum"]))
            rows, columns = matrices[0].shape
            update = update * (group["lr"] * max(1.0, rows / columns) ** 0.5)
            for matrix, one in zip(matrices, update.to(matrices[0].dtype), strict=True):
                matrix.mul_(1 - group["lr"] * group["decay"]).sub_(one)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly: five steps of a Newton-Schulz iteration. Shape [n, rows, columns]."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def make_optimizers(model: nn.Module, is_fused: bool) -> list[torch.optim.Optimizer]:
    """Both optimizers; each group remembers its full rate as `full_rate`."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.dim() == 2 and "embed" not in name else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=is_fused)
    optimizers: list[torch.optim.Optimizer] = [Muon(matrices, MATRIX_RATE), adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_rate"] = group["lr"]
    return optimizers
