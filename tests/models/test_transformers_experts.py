"""Mixtures of experts without a native file: the routers of Transformers, our experts, against Transformers itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from shoal.config.model_config import load_model_config
from shoal.distributed.group import GroupCoordinator
from shoal.errors import ConfigError, ModelError
from shoal.layers.moe import RoutedExperts
from tests.checkpoints import make_checkpoint
from tests.models.other_families import OTHER_EXPERTS, make_other
from tests.models.paged import PagedModel, Sequence, random_tokens
from tests.rank_threads import on_ranks

TOKENS = random_tokens(100, seed=2)


def expected_logprobs(path: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return torch.log_softmax(model.eval()(torch.tensor([TOKENS])).logits[0].float(), dim=-1)


def assert_same(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.log_softmax(logits, dim=-1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", OTHER_EXPERTS)
def test_one_rank_two_ranks_and_stages(tmp_path: Path, name: str) -> None:
    path = make_other(tmp_path, name)
    expected = expected_logprobs(path)
    model = PagedModel(path)
    assert model.config.model_impl == "transformers"
    for chunk in (100, 31):
        assert_same(model.logits(TOKENS, chunk), expected)
    for by_expert in (False, True):

        def of_rank(group: GroupCoordinator, by_expert: bool = by_expert) -> torch.Tensor:
            return PagedModel(path, group=group, expert_parallel=by_expert).logits(TOKENS, 37)

        for rank in on_ranks(2, of_rank):
            assert_same(rank, expected)
    hidden = None
    for layers in (range(0, 2), range(2, 3)):
        stage = PagedModel(path, layer_range=layers)
        hidden = stage.hidden([(Sequence(TOKENS), len(TOKENS))], hidden)
    with torch.inference_mode():
        assert_same(stage.model.compute_full_logits(hidden), expected)


def test_each_rank_holds_its_part_and_counts_its_tokens(tmp_path: Path) -> None:
    path = make_other(tmp_path, "olmoe")
    experts = load_model_config(path).experts
    assert experts is not None
    assert (experts.num_experts, experts.num_per_token, experts.intermediate_size) == (7, 3, 48)
    assert experts.layers == (0, 1, 2)

    def of_rank(group: GroupCoordinator) -> tuple[int, list[int]]:
        model = PagedModel(path, group=group, expert_parallel=True)
        model.logits(TOKENS, 100)
        layers = [layer for layer in model.model.modules() if isinstance(layer, RoutedExperts)]
        return model.model.weight_bytes(), torch.stack([layer.method.tokens for layer in layers]).sum(0).tolist()

    ranks = on_ranks(2, of_rank)
    assert sorted(len(counts) for _, counts in ranks) == [3, 4]
    assert sum(sum(counts) for _, counts in ranks) == len(TOKENS) * 3 * 3
    assert max(size for size, _ in ranks) < 0.7 * PagedModel(path).model.weight_bytes()


def test_the_same_as_the_native_file(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen3_moe")
    native, other = PagedModel(path), PagedModel(path, model_impl="transformers")
    assert (native.config.experts, native.config.model_impl) == (other.config.experts, "shoal")
    torch.testing.assert_close(other.logits(TOKENS, 100), native.logits(TOKENS, 100), atol=1e-3, rtol=0)


def test_what_is_refused(tmp_path: Path) -> None:
    path = make_other(tmp_path / "olmoe", "olmoe")
    with pytest.raises(ConfigError, match="OlmoeForCausalLM chooses experts by its own code.*--no-deterministic"):
        PagedModel(path, "deterministic")
    gpt_oss = make_checkpoint(tmp_path / "gpt-oss", "gpt_oss")
    with pytest.raises(ModelError, match=r"experts \(model.layers.0.mlp.experts\) that only a native .*: has_bias is"):
        load_model_config(gpt_oss, model_impl="transformers")


def test_tensors_of_experts_that_are_too_many_or_too_few(tmp_path: Path) -> None:
    path = make_other(tmp_path, "olmoe")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.experts.6.up_proj.weight"
    more = name.replace(".6.", ".7.")
    save_file({**tensors, more: tensors[name].clone()}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"unexpected tensor {more}"):
        PagedModel(path)
    del tensors[name]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"the first is {name}"):
        PagedModel(path)


def test_a_router_without_its_correction(tmp_path: Path) -> None:
    path = make_other(tmp_path, "glm4-moe")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    del tensors[name]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"the first is {name}"):
        PagedModel(path)


def test_frequencies_that_follow_the_longest_sequence(tmp_path: Path) -> None:
    """As in native files, --max-model-len decides for all requests."""
    path = make_other(tmp_path, "phimoe")
    raw = json.loads((path / "config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    short = TOKENS[:60]
    with torch.inference_mode():
        expected = torch.log_softmax(model.eval()(torch.tensor([short])).logits[0], dim=-1)
    assert raw["rope_parameters"]["original_max_position_embeddings"] == 64
    assert_same(PagedModel(path, max_model_len=64).logits(short, 60), expected)
    difference = torch.log_softmax(PagedModel(path).logits(short, 60), dim=-1) - expected
    assert difference.abs().max() > 0.1
