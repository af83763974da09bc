"""What every family with experts keeps on several ranks and stages."""

from __future__ import annotations

from pathlib import Path

import torch

from shoal.distributed.group import GroupCoordinator
from tests.models.paged import PagedModel, Sequence
from tests.models.test_tensor_parallel import run
from tests.rank_threads import on_ranks


def logits_at(
    path: Path, size: int, backend: str, expert_parallel: bool, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    return on_ranks(
        size,
        lambda group: run(PagedModel(path, backend, dtype=dtype, group=group, expert_parallel=expert_parallel)),
    )


def check_whole_experts(path: Path) -> None:
    """2 and 4 ranks that share experts whole compute what one does."""
    (expected,) = logits_at(path, 1, "torch_paged", False)
    for size in (2, 4):
        ranks = logits_at(path, size, "torch_paged", True)
        torch.testing.assert_close(ranks[0], expected, atol=1e-4, rtol=1e-5)
        assert all(torch.equal(rank, ranks[0]) for rank in ranks)


def check_stages(path: Path, tokens: list[int], expert_parallel: bool) -> None:
    """A model of 3 layers over 2 stages of 2 ranks."""
    expected = PagedModel(path).logits(tokens, 50)

    def through_stages(group: GroupCoordinator) -> torch.Tensor:
        hidden = None
        for layers in (range(0, 2), range(2, 3)):
            stage = PagedModel(path, group=group, layer_range=layers, expert_parallel=expert_parallel)
            hidden = stage.hidden([(Sequence(tokens), len(tokens))], hidden)
        with torch.inference_mode():
            return stage.model.compute_full_logits(hidden)

    for rank in on_ranks(2, through_stages):
        torch.testing.assert_close(rank, expected, atol=1e-4, rtol=1e-5)
