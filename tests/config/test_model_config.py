"""config.json of every family, in old and new spelling, against what Hugging Face's classes make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shoal.config.model_config import ModelConfig, load_model_config
from shoal.errors import ModelError
from shoal.layers.rotary import inverse_frequencies
from tests.checkpoints import make_checkpoint

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SHAPE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def write(path: Path, model_type: str = "llama", generation: Any = None, **changes: Any) -> Path:
    """Values of None are left out; a "null" is written as null."""
    raw = {"architectures": [ARCHITECTURES.get(model_type, model_type)], "model_type": model_type, **SHAPE, **changes}
    raw = {key: None if value == "null" else value for key, value in raw.items() if value is not None}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def load(path: Path, model_type: str = "llama", generation: Any = None, **changes: Any) -> ModelConfig:
    return load_model_config(write(path, model_type, generation, **changes))


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2, "head_dim": 24}, {"tie_word_embeddings": True}])
def test_defaults_are_hugging_faces(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    if model_type == "mistral":
        changes = {"num_key_value_heads": 2, **changes}
    found = load(tmp_path, model_type, **changes)
    expected = transformers.AutoConfig.from_pretrained(tmp_path)
    assert found.num_kv_heads == (expected.num_key_value_heads if "num_key_value_heads" in changes else found.num_heads)
    head_dim = getattr(expected, "head_dim", None) or expected.hidden_size // expected.num_attention_heads
    assert found.head_dim == head_dim
    assert found.max_position_embeddings == expected.max_position_embeddings
    assert found.norm_eps == expected.rms_norm_eps
    assert found.hidden_act == expected.hidden_act
    assert found.tie_word_embeddings == expected.tie_word_embeddings
    assert found.rope is not None and found.rope.theta == expected.rope_parameters["rope_theta"]
    assert found.sliding_windows == ((4096,) * 3 if model_type == "mistral" else (None,) * 3)
    assert found.dtype == "float32"


def test_opt(tmp_path: Path) -> None:
    found = load(tmp_path, "OPTForCausalLM", intermediate_size=None, ffn_dim=256, max_position_embeddings=77)
    assert (found.intermediate_size, found.num_kv_heads, found.head_dim, found.rope) == (256, 4, 16, None)
    assert found.tie_word_embeddings and found.attention_bias and found.hidden_act == "relu"
    assert found.max_position_embeddings == 77 and found.model_type == "opt"


def test_mistral_kv_heads_absent_and_null(tmp_path: Path) -> None:
    assert load(tmp_path / "a", "mistral", hidden_size=256, num_attention_heads=16).num_kv_heads == 8
    found = load(tmp_path / "b", "mistral", hidden_size=256, num_attention_heads=16, num_key_value_heads="null")
    assert found.num_kv_heads == 16


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
    "yarn-no-original": {"factor": 4.0},
    "yarn-all": {
        "factor": 16.0, "original_max_position_embeddings": 256, "beta_fast": 20, "beta_slow": 2, "truncate": False,
        "attention_factor": 1.3,
    },
    "yarn-mscale": {"factor": 16.0, "original_max_position_embeddings": 256, "mscale": 1.0, "mscale_all_dim": 0.8},
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("style", ["rope_parameters", "rope_scaling", "type"])
def test_rope_scalings_equal_hugging_faces(tmp_path: Path, name: str, style: str) -> None:
    kind = name.split("-")[0]
    numbers = dict(ROPES[name])
    changes: dict[str, Any] = {"max_position_embeddings": 2048, "head_dim": 64}
    if style == "rope_parameters":
        changes["rope_parameters"] = {"rope_type": kind, "rope_theta": 20000.0, **numbers}
    else:
        key = "type" if style == "type" else "rope_type"
        changes |= {"rope_theta": 20000.0, "rope_scaling": {key: kind, **numbers}}
    found = load(tmp_path, **changes)
    assert found.rope is not None and found.rope.theta == 20000.0 and found.rope.scaling == kind
    expected, factor = ROPE_INIT_FUNCTIONS[kind](transformers.AutoConfig.from_pretrained(tmp_path), torch.device("cpu"))
    frequencies, found_factor = inverse_frequencies(found.rope, 64)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=1e-9)
    assert found_factor == pytest.approx(factor)


def test_length_with_scaling(tmp_path: Path) -> None:
    linear = {"rope_type": "linear", "factor": 4.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert load(tmp_path / "a", max_position_embeddings=512, rope_scaling=linear).max_position_embeddings == 2048
    assert load(tmp_path / "b", max_position_embeddings=512, rope_scaling=yarn).max_position_embeddings == 2048
    assert load(tmp_path / "c", max_position_embeddings=2048, rope_scaling=yarn).max_position_embeddings == 2048


def test_sliding_windows(tmp_path: Path) -> None:
    assert (
        load(tmp_path / "a", "mistral", sliding_window=9, head_dim=16, num_key_value_heads=2).sliding_windows
        == (9,) * 3
    )
    assert load(tmp_path / "b", "mistral", sliding_window="null", num_key_value_heads=2).sliding_windows == (None,) * 3
    window = {"sliding_window": 32, "max_window_layers": 1}
    assert load(tmp_path / "c", "qwen2", **window).sliding_windows == (None,) * 3
    assert load(tmp_path / "d", "qwen2", use_sliding_window=True, **window).sliding_windows == (None, 32, 32)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    found = load(tmp_path / "e", "qwen3", use_sliding_window=True, layer_types=types, **window)
    assert found.sliding_windows == (32, None, 32)
    assert load(tmp_path / "f", "llama", sliding_window=32).sliding_windows == (None,) * 3


def test_ids_dtype_and_generation_config(tmp_path: Path) -> None:
    generation = {
        "eos_token_id": [3, 5],
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "do_sample": True,
        "min_p": None,
    }
    found = load(tmp_path / "a", generation=generation, eos_token_id=3, bos_token_id=1, torch_dtype="bfloat16")
    assert found.eos_token_ids == (3, 5) and found.bos_token_id == 1 and found.dtype == "bfloat16"
    assert found.generation_defaults == {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
    found = load(tmp_path / "b", eos_token_id=[7, 8], dtype="float16")
    assert found.eos_token_ids == (7, 8) and found.dtype == "float16" and found.generation_defaults == {}
    assert load(tmp_path / "c").eos_token_ids == ()
    assert found.raw["eos_token_id"] == [7, 8]


def test_architecture_from_model_type(tmp_path: Path) -> None:
    path = write(tmp_path, "qwen2")
    raw = json.loads((path / "config.json").read_text())
    del raw["architectures"]
    (path / "config.json").write_text(json.dumps(raw))
    assert load_model_config(path).architecture == "Qwen2ForCausalLM"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "GPT2LMHeadModel"},
            "architecture GPT2LMHeadModel: Transformers .* does not know model_type 'GPT2LMHeadModel'; "
            "families with a file of their own: LlamaForCausalLM",
        ),
        ({"hidden_size": 65}, "hidden_size 65 is not a multiple of num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer; found 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer; found 0"),
        ({"intermediate_size": None}, "intermediate_size must be a positive integer; found None"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported; supported: float32, bfloat16, float16"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope scaling 'mrope' is not supported; supported: default"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope scaling longrope needs short_factor, a list"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope scaling linear needs factor above 0; found None"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "llama3 needs low_freq_factor above 0"),
        ({"rope_scaling": [1]}, r"must be an object; found \[1\]"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, r"per layer type \(full_attention\)"),
        ({"rope_theta": -1}, "rope_theta must be above 0; found -1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"eos_token_id": "</s>"}, "token ids must be integers; found '</s>'"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention"]},
            "layer_types names 1 layers, num_hidden_layers is 3",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention"] * 2 + ["mamba"]},
            "layer type 'mamba' is not supported",
        ),
        (
            {"model_type": "mistral", "sliding_window": -3, "num_key_value_heads": 2},
            "sliding_window must be a positive",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(ModelError, match=message) as error:
        load_model_config(path)
    assert "config.json" in str(error.value)


def test_directories_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere' is not there"):
        load_model_config(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="file' is a file; give a directory"):
        load_model_config(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="has no config.json"):
        load_model_config(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        load_model_config(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="must hold a JSON object; found list"):
        load_model_config(tmp_path / "empty")
    with pytest.raises(ModelError, match=r"generation_config.json cannot be read as JSON"):
        path = write(tmp_path / "generation")
        (path / "generation_config.json").write_text("nonsense")
        load_model_config(path)


def test_sampling_defaults_that_no_request_could_use_are_found_at_once(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "qwen2")
    (directory / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(ModelError, match="generation_config.json.*temperature"):
        load_model_config(directory)
