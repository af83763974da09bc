"""What nobody asks for leaves keys and values in the last layer and goes no further: nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.distributed.group import GroupCoordinator
from tests.checkpoints import VARIANTS, make_checkpoint, make_variant
from tests.models.paged import PagedModel, Sequence, random_tokens
from tests.models.test_tensor_parallel import STEPS, StreamReducer, assert_same_logits
from tests.rank_threads import on_ranks


def run(model: PagedModel, of_last: bool) -> torch.Tensor:
    """Logits of the last tokens of three sequences' steps."""
    sequences = [Sequence(random_tokens(80, seed, model.config.vocab_size)) for seed in range(3)]
    steps = [[(sequences[index], count) for index, count in step] for step in STEPS]
    if of_last:
        return torch.cat([model.last_logits(step) for step in steps])
    return torch.stack([rows[-1] for step in steps for rows in model.step(step)])


def rows_of_last_layer(model: PagedModel) -> list[int]:
    """How many tokens the MLP of the last layer computes in each step: filled while the model runs."""
    seen: list[int] = []
    mlp = model.model.layers[-1].mlp
    mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_cache_are_those_of_all_tokens(tmp_path: Path, variant: str) -> None:
    path = make_variant(tmp_path, variant)
    whole, last = PagedModel(path), PagedModel(path)
    is_opt = "opt" in variant
    seen = [] if is_opt else rows_of_last_layer(last)
    assert_same_logits(run(last, True), run(whole, False))
    for ours, theirs in zip(last.kv_caches, whole.kv_caches, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert is_opt or seen == [2, 2, 3]


@pytest.mark.parametrize("variant", ["llama", "qwen3-moe", "gemma3"])
def test_bits_are_the_same_in_deterministic_mode(tmp_path: Path, variant: str) -> None:
    path = make_variant(tmp_path, variant)
    whole, last = PagedModel(path, "deterministic"), PagedModel(path, "deterministic")
    assert torch.equal(run(last, True), run(whole, False))


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_ranks_compute_the_last_layer_whole_and_the_others_in_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_layers: int
) -> None:
    path = make_checkpoint(tmp_path, "llama", num_hidden_layers=num_layers)
    expected = run(PagedModel(path), False)
    monkeypatch.setattr("shoal.models.llama.OVERLAP_TOKENS", 22)

    def work(group: GroupCoordinator) -> tuple[torch.Tensor, list[tuple[int, str]], list[int]]:
        reducer = StreamReducer(group)
        group.attach_large(reducer)
        model = PagedModel(path, group=group)
        seen = rows_of_last_layer(model)
        return run(model, True), reducer.calls, seen

    for logits, calls, seen in on_ranks(2, work):
        assert_same_logits(logits, expected)
        assert seen == [2, 2, 3]
        kinds = [kind for _, kind in calls]
        a_step = ["norm"] * (4 * (num_layers - 1) - 2) + ["stream"] * 2 if num_layers > 1 else []
        assert kinds == 3 * a_step
