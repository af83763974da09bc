"""Mixtures of experts on several ranks: what one computes, whether they split experts or share them whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.distributed.group import GroupCoordinator
from shoal.errors import ConfigError
from shoal.layers.moe import RoutedExperts
from tests.checkpoints import make_checkpoint
from tests.models.experts_on_ranks import check_stages, check_whole_experts, logits_at
from tests.models.paged import PagedModel, Sequence, random_tokens
from tests.rank_threads import on_ranks

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
# Widths that are cut into eight shards; seven experts, so that ranks share them unevenly.
SIZES = {
    "num_attention_heads": 8,
    "hidden_size": 128,
    "mixtral": {"intermediate_size": 112, "num_local_experts": 7},
    "qwen2_moe": {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 80, "num_experts": 7},
    "qwen3_moe": {"moe_intermediate_size": 48, "num_experts": 7},
}


def make(path: Path, family: str, dtype: torch.dtype = torch.float32, **changes: int) -> Path:
    sizes = SIZES[family]
    assert isinstance(sizes, dict)
    return make_checkpoint(path, family, dtype=dtype, num_attention_heads=8, hidden_size=128, **{**sizes, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_share_experts_whole(tmp_path: Path, family: str) -> None:
    check_whole_experts(make(tmp_path, family))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_deterministic_bits_do_not_depend_on_the_ranks(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    path = make(tmp_path, family, dtype)
    (expected,) = logits_at(path, 1, "deterministic", False, dtype)
    assert expected.isfinite().all()
    for size in (2, 4):
        for by_expert in (False, True):
            for rank in logits_at(path, size, "deterministic", by_expert, dtype):
                assert torch.equal(rank, expected), (size, by_expert)


@pytest.mark.parametrize("family", FAMILIES)
def test_deterministic_bits_do_not_depend_on_the_batch(tmp_path: Path, family: str) -> None:
    path = make(tmp_path, family)
    model = PagedModel(path, "deterministic")
    tokens = random_tokens(60, seed=1)
    alone = model.logits(tokens, 60)
    assert torch.equal(model.logits(tokens, 7), alone)
    others = [Sequence(random_tokens(length, seed=length)) for length in (1, 33, 50)]
    mine = Sequence(tokens)
    work = [(others[0], 1), (mine, 60), (others[1], 33), (others[2], 50)]
    assert torch.equal(model.step(work)[1], alone)


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_of_two_ranks(tmp_path: Path, family: str, expert_parallel: bool) -> None:
    check_stages(make(tmp_path, family, num_hidden_layers=3), random_tokens(50, seed=1), expert_parallel)


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_ranks_hold_their_part_and_count_their_tokens(tmp_path: Path, expert_parallel: bool) -> None:
    path = make(tmp_path, "qwen3_moe")
    num_tokens, num_chosen = 30, 3

    def work(group: GroupCoordinator) -> list[tuple[int, int, list[int]]]:
        model = PagedModel(path, group=group, expert_parallel=expert_parallel)
        model.logits(random_tokens(num_tokens, seed=1), num_tokens)
        layers = [layer for layer in model.model.modules() if isinstance(layer, RoutedExperts)]
        return [(layer.weight_bytes(), layer.first_expert, layer.method.tokens.tolist()) for layer in layers]

    whole = on_ranks(1, work)[0]
    assert [sum(tokens) for _, _, tokens in whole] == [num_tokens * num_chosen] * 2
    assert whole[0][0] == 7 * 3 * 48 * 128 * 4
    halves = on_ranks(2, work)
    for index, (num_bytes, _, tokens) in enumerate(whole):
        assert sum(rank[index][0] for rank in halves) == num_bytes
        if expert_parallel:
            assert [rank[index][1] for rank in halves] == [0, 3]
            assert halves[0][index][2] + halves[1][index][2] == tokens
        else:
            assert all(rank[index][2] == tokens for rank in halves)


def test_more_ranks_than_experts_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path, "mixtral", num_local_experts=3)
    with pytest.raises(ConfigError, match="3 experts cannot be shared whole by 4 ranks"):
        logits_at(path, 4, "torch_paged", True)
