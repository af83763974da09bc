"""What a checkpoint's files say of pooling, and what --runner and --hf-overrides change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.config.model_config import load_model_config
from shoal.config.pooling import PoolingConfig, decoder_names, parse_overrides
from shoal.config.resolve import make_engine_config
from shoal.errors import ConfigError, ModelError
from tests.config.model_directory import write_model_directory
from tests.pooling_checkpoints import write_dense, write_modules


def model(path: Path, architecture: str = "Qwen2ForCausalLM", **changes: Any) -> Path:
    write_model_directory(path, architectures=[architecture], **changes)
    return path


def pooling(path: Path, **options: Any) -> PoolingConfig | None:
    return load_model_config(path, **options).pooling


def test_a_model_with_a_head_for_tokens_generates(tmp_path: Path) -> None:
    assert pooling(model(tmp_path)) is None
    assert pooling(tmp_path, runner="generate") is None


def test_a_bare_decoder_embeds(tmp_path: Path) -> None:
    config = load_model_config(model(tmp_path, "Qwen2Model"))
    assert config.architecture == "Qwen2ForCausalLM" and config.attention_bias
    assert config.pooling == PoolingConfig(task="embed", normalize=True, dimensions=(config.hidden_size,))
    assert pooling(model(tmp_path), runner="pooling") == config.pooling
    with pytest.raises(ConfigError, match="Qwen2Model has no head to generate with; --runner auto or pooling"):
        pooling(model(tmp_path, "Qwen2Model"), runner="generate")


def test_sentence_transformers_say_how(tmp_path: Path) -> None:
    for mode, kind in (("lasttoken", "last"), ("mean", "mean"), ("cls", "cls")):
        write_modules(model(tmp_path), mode, "Normalize")
        found = pooling(tmp_path)
        assert found is not None and (found.kind, found.normalize) == (kind, True)
        assert make_engine_config(model=str(tmp_path), device="cpu").enable_prefix_caching == (kind == "last")
    write_modules(tmp_path, "mean")
    found = pooling(tmp_path)
    assert found is not None and not found.normalize
    assert pooling(tmp_path, runner="generate") is None
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')  # as newer versions write it
    found = pooling(tmp_path)
    assert found is not None and found.kind == "cls"


def test_what_cannot_be_pooled_is_refused_by_name(tmp_path: Path) -> None:
    write_modules(model(tmp_path), "pooling_mode_max_tokens")
    with pytest.raises(ModelError, match="1_Pooling/config.json: pooling pooling_mode_max_tokens is not supported"):
        pooling(tmp_path)
    write_modules(tmp_path, "mean", "LayerNorm")
    with pytest.raises(ModelError, match=r"modules\.json: the module 'LayerNorm' is not supported"):
        pooling(tmp_path)
    with pytest.raises(ModelError, match="is_causal false is not supported for Qwen2Model"):
        pooling(model(tmp_path / "both-ways", "Qwen2Model", is_causal=False))
    write_modules(tmp_path, "mean")
    (tmp_path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"1_Pooling/config\.json is missing"):
        pooling(tmp_path)
    (tmp_path / "modules.json").write_text("no")
    with pytest.raises(ModelError, match=r"modules\.json cannot be read as JSON"):
        pooling(tmp_path)


def test_layers_behind_the_pooling(tmp_path: Path) -> None:
    size = load_model_config(model(tmp_path)).hidden_size
    write_modules(tmp_path, "mean", "Dense", "Normalize")
    write_dense(tmp_path, 2, torch.ones(24, size), None, "torch.nn.modules.linear.Identity")
    found = pooling(tmp_path)
    assert found is not None and found.normalize
    assert [(layer.directory, layer.out_features, layer.bias) for layer in found.dense] == [("2_Dense", 24, False)]
    assert found.dimensions == (24,) and found.embedding_size(size) == 24
    file = tmp_path / "2_Dense" / "config.json"
    right = json.loads(file.read_text())
    for changes, message in (
        ({"in_features": 7}, f"7 inputs and 24 outputs; what comes to it has {size} numbers"),
        ({"activation_function": "torch.nn.modules.activation.ELU"}, "activation_function .*ELU is not supported"),
        ({"module_input_name": "token_embeddings"}, "module_input_name 'token_embeddings' is not supported"),
    ):
        file.write_text(json.dumps({**right, **changes}))
        with pytest.raises(ModelError, match=message):
            pooling(tmp_path)
    file.unlink()
    with pytest.raises(ModelError, match=r"2_Dense/config\.json is missing"):
        pooling(tmp_path)
    write_modules(tmp_path, "mean", "Normalize", "Dense")
    with pytest.raises(ModelError, match="there is a module behind Normalize"):
        pooling(tmp_path)


def test_scores(tmp_path: Path) -> None:
    name = "Qwen2ForSequenceClassification"
    for changes, labels, activation in (
        ({"num_labels": 1}, 1, "sigmoid"),
        ({"id2label": {"0": "LABEL_0"}}, 1, "sigmoid"),
        ({}, 2, "softmax"),  # Transformers does not write what is its default
        ({"num_labels": 1, "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, 1, "identity"),
        ({"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.Sigmoid"}}, 1, "sigmoid"),
    ):
        found = pooling(model(tmp_path, name, **changes))
        assert found == PoolingConfig(task="score", num_labels=labels, activation=activation)
    with pytest.raises(ModelError, match="activation 'Tanh' of scores is not supported"):
        pooling(model(tmp_path, name, num_labels=1, sbert_ce_default_activation_function="Tanh"))
    with pytest.raises(ModelError, match="num_labels must be a positive integer; found 0"):
        pooling(model(tmp_path, name, num_labels=0))
    with pytest.raises(ConfigError, match="has no head to generate with"):
        pooling(model(tmp_path, name), runner="generate")


def test_two_tokens_of_the_vocabulary(tmp_path: Path) -> None:
    model(tmp_path)
    found = pooling(tmp_path, overrides={"classifier_from_token": [4, 9]})
    assert found == PoolingConfig(task="score", label_token_ids=(4, 9), activation="sigmoid")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"no": 7, "yes": 5}}}))
    found = pooling(tmp_path, overrides={"classifier_from_token": ["no", "yes"]})
    assert found is not None and found.label_token_ids == (7, 5)
    # As users of vLLM say it.
    overrides = {
        "architectures": ["Qwen2ForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "is_original_qwen3_reranker": True,
    }
    assert pooling(tmp_path, overrides=overrides) == found
    with pytest.raises(ConfigError, match=r"these are no tokens of tokenizer\.json"):
        pooling(tmp_path, overrides={"classifier_from_token": ["no", "perhaps"]})
    with pytest.raises(ConfigError, match="must be two tokens"):
        pooling(tmp_path, overrides={"classifier_from_token": ["yes"]})


def test_dimensions(tmp_path: Path) -> None:
    size = load_model_config(model(tmp_path)).hidden_size
    for overrides, dimensions in (
        ({}, (size,)),
        ({"is_matryoshka": True}, None),
        ({"matryoshka_dimensions": [8, 16]}, (8, 16, size)),
    ):
        found = pooling(tmp_path, runner="pooling", overrides=overrides)
        assert found is not None and found.dimensions == dimensions
    with pytest.raises(ModelError, match="matryoshka_dimensions must be numbers from 1"):
        pooling(tmp_path, runner="pooling", overrides={"matryoshka_dimensions": [size + 1]})


def test_overrides(tmp_path: Path) -> None:
    assert parse_overrides(None) == {} and parse_overrides('{"a": 1}') == parse_overrides({"a": 1}) == {"a": 1}
    for wrong in ("a", "[1]", "{"):
        with pytest.raises(ConfigError, match="hf_overrides must be a JSON object"):
            parse_overrides(wrong)
    config = make_engine_config(model=str(model(tmp_path)), device="cpu", hf_overrides={"max_position_embeddings": 99})
    assert config.max_model_len == 99


def test_names() -> None:
    known = ("Qwen3ForCausalLM",)
    given = ["Qwen3Model", "Qwen3ForSequenceClassification", "BertModel", "Qwen3ForCausalLM"]
    assert decoder_names(given, known) == ["Qwen3ForCausalLM", "Qwen3ForCausalLM", "BertModel", "Qwen3ForCausalLM"]
