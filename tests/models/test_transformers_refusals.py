"""What cannot be served through Transformers is refused by name, before a request comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import masking_utils

from shoal.attention.registry import create_attention_backend
from shoal.config.model_config import load_model_config
from shoal.errors import ModelError
from shoal.layers.context import BuildContext
from shoal.models.registry import build_model
from shoal.models.transformers_attention import _window_of
from shoal.weights.loader import load_weights
from tests.models.other_families import make_other
from tests.models.paged import CPU, PagedModel, Sequence
from tests.models.remote_code import make_remote

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def write(directory: Path, class_name: str, architecture: str, **values: Any) -> Path:
    config = getattr(transformers, class_name)(**values)
    raw = {**config.to_dict(), "architectures": [architecture]}
    (directory / "config.json").write_text(json.dumps(raw, default=str), encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("class_name", "architecture", "values", "message"),
    [
        ("FalconConfig", "FalconForCausalLM", {**SMALL, "alibi": True}, "computes attention in its own code"),
        ("FalconConfig", "FalconForCausalLM", {**SMALL, "new_decoder_architecture": True}, "attention in its own code"),
        ("MptConfig", "MptForCausalLM", {}, "computes attention in its own code"),
        ("BloomConfig", "BloomForCausalLM", {**SMALL}, "computes attention in its own code"),
        ("MambaConfig", "MambaForCausalLM", {**SMALL}, "layers of type linear_attention"),
        ("JambaConfig", "JambaForCausalLM", {**SMALL}, "layers of type|recurrent state"),
        ("T5Config", "T5ForConditionalGeneration", {}, "is an encoder-decoder"),
        ("JetMoeConfig", "JetMoeForCausalLM", {**SMALL}, r"weights of 3 dimensions \(model.layers.0.mlp.input_linear"),
        ("BertConfig", "BertForMaskedLM", {**SMALL}, "is no causal language model; .* BertLMHeadModel"),
        ("LlavaConfig", "LlavaForConditionalGeneration", {}, "takes more than text"),
    ],
)
def test_kinds_of_models(
    tmp_path: Path, class_name: str, architecture: str, values: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, class_name, architecture, **values)
    with pytest.raises(ModelError, match=f"architecture {architecture}.*({message})") as error:
        load_model_config(path, model_impl="transformers")
    assert str(path / "config.json") in str(error.value)


def test_code_of_the_model_runs_only_where_it_is_trusted(tmp_path: Path) -> None:
    path = make_remote(tmp_path)
    for impl in ("auto", "transformers"):
        with pytest.raises(ModelError, match="comes with Python code of its own .* unless --trust-remote-code"):
            load_model_config(path, model_impl=impl)
    config = load_model_config(path, trust_remote_code=True)
    assert config.architecture == "ShellForCausalLM" and config.trust_remote_code
    with pytest.raises(ModelError, match="cannot build ShellForCausalLM"):
        build(load_model_config(path, trust_remote_code=True).__class__(**{**vars(config), "trust_remote_code": False}))
    native = make_other(tmp_path / "other", "qwen2")
    assert not load_model_config(native, trust_remote_code=True).trust_remote_code


def build(config: Any) -> Any:
    context = BuildContext(dtype=torch.float32, device=CPU, attention_backend=create_attention_backend("torch_paged"))
    return build_model(config, context)


def remote(path: Path, variant: str) -> PagedModel:
    return PagedModel(make_remote(path, variant), trust_remote_code=True)


def test_code_of_the_model_computes_what_its_family_does(tmp_path: Path) -> None:
    expected = PagedModel(make_remote(tmp_path / "a"), trust_remote_code=True).logits([5, 6, 7], 3)
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    raw |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "a" / "config.json").write_text(json.dumps(raw))
    native = load_model_config(tmp_path / "a", trust_remote_code=True)
    assert native.model_impl == "shoal"
    torch.testing.assert_close(PagedModel(tmp_path / "a").logits([5, 6, 7], 3), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("argument", "its layer 0 gives attention an argument 'alibi', which paged attention does not know"),
        ("mask", "its layer 0 adds a mask or bias of its own to the scores"),
        ("without", "its layer 0 does without the attention function"),
        ("twice", "its layer 0 calls attention more than once"),
        ("later", "its layer 0 attends to later tokens"),
    ],
)
def test_what_attention_is_asked_for(tmp_path: Path, variant: str, message: str) -> None:
    model = remote(tmp_path, variant)
    with pytest.raises(ModelError, match=f"architecture ShellForCausalLM cannot be served .*: {message}"):
        model.step([(Sequence([5, 6, 7]), 3)])


def test_frequencies_that_cannot_be_fixed(tmp_path: Path) -> None:
    """By a table the longest sequence that is served decides; code that is no rotary embedding by name has none."""
    path = make_remote(tmp_path, "turns")
    raw = json.loads((path / "config.json").read_text())
    build(load_model_config(path, trust_remote_code=True))
    raw["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="rope_type 'dynamic' .* the longest sequence of a step"):
        build(load_model_config(path, trust_remote_code=True))


def test_weights_that_do_not_belong(tmp_path: Path) -> None:
    path = make_other(tmp_path, "olmo2")
    config = load_model_config(path)
    raw = {**config.raw, "num_hidden_layers": 2}
    (path / "config.json").write_text(json.dumps(raw))
    config = load_model_config(path)
    with pytest.raises(ModelError, match="unexpected tensor model.layers.2"):
        load_weights(build(config), config)


def test_windows_are_read_out_of_masks() -> None:
    assert _window_of(masking_utils.causal_mask_function, 100) is None
    assert _window_of(masking_utils.sliding_window_causal_mask_function(24), 100) == 24
    assert _window_of(masking_utils.sliding_window_causal_mask_function(1), 100) == 1
    with pytest.raises(ModelError, match="chunks"):
        _window_of(masking_utils.chunked_causal_mask_function(30, torch.zeros(1, dtype=torch.int64)), 100)
    with pytest.raises(ModelError, match="more than a window of earlier tokens"):
        _window_of(masking_utils.bidirectional_mask_function, 100)
