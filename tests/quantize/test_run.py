"""Whole checkpoints: what is written, that it is what was meant, and that a run that was ended comes to the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from shoal import LLM, SamplingParams
from shoal.config.quantization import read_quantization
from shoal.errors import ConfigError, ModelError
from shoal.quantize.network import Network
from shoal.quantize.order import QuantizeLayer, QuantizeNote, QuantizeProgress
from shoal.quantize.output import prepare_output
from shoal.quantize.run import quantize
from shoal.quantize.source import read_source
from shoal.quantize.tensors import TensorReader
from tests.checkpoints import make_checkpoint
from tests.models.paged import PagedModel, random_tokens
from tests.quantize.checkpoints import order_for, plain_copy, rows_of, run_order, tensors_of


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("plain"), "qwen2", intermediate_size=128)


METHODS = [
    ("gptq", {"bits": 8}), ("gptq", {"desc_act": True, "symmetric": False, "group_size": 16}), ("awq", {}),
    ("fp8", {"granularity": "tensor", "calibration": None}), ("int8", {}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "changes"), METHODS, ids=["gptq-8", "gptq-ordered", "awq", "fp8", "int8"])
def test_what_is_written_serves_as_the_matrices_it_stands_for(plain, tmp_path, method, changes):
    out = tmp_path / "out"
    news = run_order(order_for(plain, out, method, **changes))
    done = [item.done for item in news if isinstance(item, QuantizeProgress)]
    assert done == sorted(done) and done[0] >= 0 and done[-1] < 1
    found = json.loads((out / "config.json").read_text())["quantization_config"]
    config = read_quantization(found)
    assert config is not None and config.method == {"gptq": "gptq", "awq": "awq"}.get(method, "compressed-tensors")
    assert (out / "quantize_config.json").is_file() == (method == "gptq")
    assert not (out / "quantize_state.json").exists() and (out / "tokenizer.json").is_file()
    rows = rows_of(out)
    assert len(rows) == 7 * sum(isinstance(item, QuantizeLayer) for item in news)
    if method == "gptq":
        assert all(row["error"] < row["nearest"] for row in rows)
    if method == "awq":
        assert sum(row["error"] for row in rows) < sum(row["nearest"] for row in rows)
    assert all(0 < row["error"] < 0.3 for row in rows)
    model = AutoModelForCausalLM.from_pretrained(plain_copy(plain, out, tmp_path / "copy"), dtype=torch.float32)
    prompt = torch.arange(20, 40)
    with torch.inference_mode():
        expected = model.generate(
            prompt[None], attention_mask=torch.ones(1, 20), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
    with LLM(str(out), device="cpu", dtype="float32", max_model_len=64) as llm:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": prompt.tolist()}], params, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == expected[0, 20:].tolist()


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_other_families_by_their_code_in_transformers(family, tmp_path):
    plain = make_checkpoint(tmp_path / "plain", family)
    run_order(order_for(plain, tmp_path / "gptq", "gptq", group_size=16))
    assert all(row["error"] < row["nearest"] for row in rows_of(tmp_path / "gptq"))
    run_order(order_for(plain, tmp_path / "awq", "awq", group_size=16))
    # A fold into the norms must leave the model as it was, but for rounding of the matrices.
    rows = rows_of(tmp_path / "awq")
    assert sum(row["error"] for row in rows) < sum(row["nearest"] for row in rows)
    original = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    copy = AutoModelForCausalLM.from_pretrained(plain_copy(plain, tmp_path / "awq", tmp_path / "copy"))
    ids = torch.arange(20, 52)[None]
    with torch.inference_mode():
        states = [model(ids, output_hidden_states=True).hidden_states[1] for model in (original, copy)]
    assert (states[1] - states[0]).norm() / states[0].norm() < 0.35


class Ended(Exception):
    pass


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_run_that_was_ended_goes_on_and_comes_to_the_same(plain, tmp_path, method):

    whole, out = tmp_path / "whole", tmp_path / "out"
    run_order(order_for(plain, whole, method))
    order = order_for(plain, out, method)
    source = read_source(Path(order.model))

    def say(item):
        # In the middle of the second layer.
        if isinstance(item, QuantizeProgress) and item.layer == 2 and item.phase == "self_attn.o_proj":
            raise Ended

    prepare_output(order, source, overwrite=False)
    with pytest.raises(Ended):
        quantize(order, say)
    assert not (out / "config.json").exists()
    with pytest.raises(ConfigError, match="bits was 4, is 8"):
        prepare_output(order_for(plain, out, method, bits=8), source, overwrite=False)
    text = Path(order.calibration).read_text()
    Path(order.calibration).write_text(text.replace("a", "b"))
    with pytest.raises(ConfigError, match="calibration_sha256 was"):
        prepare_output(order, source, overwrite=False)
    Path(order.calibration).write_text(text)
    news = run_order(order)
    assert [item.resumed for item in news if isinstance(item, QuantizeLayer)][:2] == [True, False]
    for path in sorted(whole.glob("*.safetensors")):
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    with pytest.raises(ConfigError, match="holds a finished checkpoint"):
        prepare_output(order, source, overwrite=False)
    assert prepare_output(order, source, overwrite=True).rows == [] and not list(out.glob("*.safetensors"))


def test_pruned_matrices_have_their_zeros(plain, tmp_path):
    run_order(order_for(plain, tmp_path / "out", "int8", sparsity=0.5, two_of_four=True, calibration=None))
    weight = tensors_of(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"]
    assert bool(((weight == 0).unflatten(1, (-1, 4)).sum(2) >= 2).all())
    run_order(order_for(plain, tmp_path / "gptq", "gptq", sparsity=0.5))
    assert all(row["sparsity"] >= 0.5 and row["error"] < row["nearest"] for row in rows_of(tmp_path / "gptq"))


def test_matrices_that_are_left_as_they_are(plain, tmp_path):
    for method in ("gptq", "awq", "fp8"):
        out = tmp_path / method
        run_order(order_for(plain, out, method, ignore=("down_proj",)))
        config = read_quantization(json.loads((out / "config.json").read_text())["quantization_config"])
        name = "model.layers.0.mlp.down_proj"
        assert torch.equal(tensors_of(out)[f"{name}.weight"], tensors_of(plain)[f"{name}.weight"]) or method == "awq"
        assert not any("down_proj" in row["name"] for row in rows_of(out))
        assert method == "gptq" or (
            config is not None and config.keeps(name) and not config.keeps(name[:-9] + "up_proj")
        )


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_a_layer_that_is_left_as_it_is(plain, tmp_path, method):
    out = tmp_path / "out"
    run_order(order_for(plain, out, method, ignore=("layers.0",)))
    found, expected = tensors_of(out), tensors_of(plain)
    first = [name for name in expected if name.startswith("model.layers.0.")]
    assert first and all(torch.equal(found[name], expected[name]) for name in first)
    assert {row["layer"] for row in rows_of(out)} == {1}
    prompts, greedy = ["This is a"], SamplingParams(max_tokens=4, temperature=0.0)
    with LLM(out, dtype="float32", max_num_seqs=4, max_model_len=64) as llm:
        assert len(llm.generate(prompts, greedy)[0].outputs[0].token_ids) == 4


def test_weights_beside_those_of_the_model_are_not_taken(plain, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(plain, model)
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, model / "consolidated.safetensors")
    assert read_source(model).tensors.keys() == read_source(plain).tensors.keys()
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    with pytest.raises(ModelError, match="has shards such as model-00001-of-00001.safetensors but no"):
        read_source(model)
    (model / "model.safetensors.index.json").write_text('{"weight_map": ["model-00001-of-00001.safetensors"]}')
    with pytest.raises(ModelError, match="has no weight_map of names"):
        read_source(model)


def test_a_model_without_a_tokenizer(tmp_path):
    plain = make_checkpoint(tmp_path / "plain", "gemma3")
    for path in plain.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        run_order(order_for(plain, tmp_path / "out", "gptq", group_size=-1))


MIXTURES = {
    "mixtral": ("block_sparse_moe.experts.1.w2", ("block_sparse_moe.gate",)),
    "qwen2_moe": ("mlp.experts.1.down_proj", ("mlp.gate", "mlp.shared_expert_gate")),
    "deepseek_v3": ("mlp.experts.1.down_proj", ("mlp.gate",)),
}


@pytest.mark.parametrize("method", ["gptq", "int8"])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts(family, method, tmp_path):
    plain = make_checkpoint(tmp_path / "plain", family)
    out = tmp_path / "out"
    run_order(order_for(plain, out, method, group_size=-1, bits=8))
    expert, routers = MIXTURES[family]
    config = read_quantization(json.loads((out / "config.json").read_text())["quantization_config"])
    rows, last = rows_of(out), f"model.layers.{max(row['layer'] for row in rows_of(out))}"
    assert config is not None and any(row["name"] == expert for row in rows)
    assert f"{last}.{expert}.weight_scale" in tensors_of(out) or f"{last}.{expert}.qweight" in tensors_of(out)
    for router in routers:
        assert torch.equal(tensors_of(out)[f"{last}.{router}.weight"], tensors_of(plain)[f"{last}.{router}.weight"])
        assert method == "gptq" or config.keeps(f"{last}.{router}")
    tokens = random_tokens(40, seed=1)
    expected = PagedModel(plain_copy(plain, out, tmp_path / "copy")).logits(tokens, 40)
    torch.testing.assert_close(PagedModel(out).logits(tokens, 40), expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_compute_what_transformers_computes(family, tmp_path):
    plain = make_checkpoint(tmp_path / "plain", family)
    ids = torch.arange(20, 52)[None]
    network = Network(plain, TensorReader(read_source(plain)), torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.inference_mode():
        (hidden,), records = network.embed(ids)
        for index in range(network.num_layers - 1):
            network.load_layer(index)
            hidden = network.run_layer(index, hidden, records[index])
        expected = model(ids, output_hidden_states=True).hidden_states[network.num_layers - 1]
    assert network.of_experts(network.num_layers - 1)
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-4)


def test_experts_that_no_token_reaches_are_rounded(tmp_path):
    plain = make_checkpoint(tmp_path / "plain", "qwen3_moe", num_experts=32, num_experts_per_tok=1)
    news = run_order(order_for(plain, tmp_path / "out", "gptq", group_size=-1, num_samples=2, sequence_length=8))
    notes = [item.text for item in news if isinstance(item, QuantizeNote)]
    assert any("no token of the calibration text reaches" in note and "mlp.experts." in note for note in notes)
    rows = [row for row in rows_of(tmp_path / "out") if ".experts." in row["name"]]
    unreached = [row for row in rows if row["error"] == row["nearest"]]
    assert unreached and len(unreached) < len(rows) and all(row["error"] > 0 for row in rows)
    assert PagedModel(tmp_path / "out").logits([1, 2, 3, 4], 4).isfinite().all()


def test_awq_of_experts_is_refused(tmp_path):
    plain = make_checkpoint(tmp_path / "plain", "qwen3_moe")
    with pytest.raises(ConfigError, match="--method awq of mixtures of experts is not built"):
        run_order(order_for(plain, tmp_path / "out", "awq", group_size=-1))


def test_layers_of_another_form_are_refused_by_name(tmp_path):
    plain = make_checkpoint(tmp_path / "plain", "gpt_oss")
    with pytest.raises(ModelError, match="several matrices in one tensor"):
        run_order(order_for(plain, tmp_path / "out", "fp8", calibration=None))
