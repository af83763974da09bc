"""Training end to end on a CPU, in miniature, and the folder that it leaves."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tools.tiny.checkpoint import save_model
from tools.tiny.model import Shape, TinyModel
from tools.tiny.optimizer import orthogonal
from tools.tiny.packing import LEARNT_BIT, Recipe, make_shard
from tools.tiny.training import Plan, rate_factor, train

SHIPPED = Path(__file__).parents[2] / "shoal" / "assets" / "shoal-tiny"
MOST_BYTES = 12_000_000


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))


def test_three_steps_lower_the_loss_and_leave_a_model(tmp_path, tokenizer):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    plan = Plan(out=tmp_path, steps=3, batch_tokens=512, longest_row=512, warmup_steps=1, log_every=1)
    losses = train(plan, tokenizer)
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_trained_model_is_the_qwen2_of_transformers(tmp_path, tokenizer):
    torch.manual_seed(0)
    model = TinyModel(Shape(), torch.float32)
    for name, parameter in model.named_parameters():  # so that a norm or bias in the wrong place shows
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
        parameter.data = parameter.data.bfloat16().float()
    save_model(model, tokenizer, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(0, 4096, (2, 40))
    with torch.inference_mode():
        ours = model(tokens) @ model.embed_tokens.weight.T
        torch.testing.assert_close(ours, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_seed_names_one_shard_and_answers_are_marked(tokenizer):
    recipe = Recipe(str(SHIPPED / "tokenizer.json"), batch_tokens=2048, num_batches=2, longest_row=512)
    shard = make_shard(recipe, 11)
    assert shard.shape == (2, 4, 512)
    assert (shard == make_shard(recipe, 11)).all() and (shard != make_shard(recipe, 12)).any()
    turn_end = tokenizer.token_to_id("<|im_end|>")
    assert (shard == (turn_end | LEARNT_BIT)).any(), "the end of an answer is learnt"
    assert (shard == turn_end).any(), "the end of a question is not"


def test_the_rate_rises_stays_and_falls_to_zero():
    assert rate_factor(0.0, 0, 100) == pytest.approx(0.01)
    assert rate_factor(0.2, 5000, 100) == 1.0
    assert rate_factor(1.0, 9000, 100) == 0.0


def test_the_update_is_nearly_orthogonal():
    torch.manual_seed(0)
    singular_values = torch.linalg.svdvals(orthogonal(torch.randn(3, 64, 32)))
    assert singular_values.min() > 0.6 and singular_values.max() < 1.3


def test_what_ships_is_small_bfloat16_and_in_two_shards():
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < MOST_BYTES
    index = json.loads((SHIPPED / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    num_parameters = 0
    for shard in shards:
        with safe_open(SHIPPED / shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                assert tensors.get_tensor(name).dtype == torch.bfloat16
                num_parameters += tensors.get_tensor(name).numel()
    assert num_parameters == 5_512_448
