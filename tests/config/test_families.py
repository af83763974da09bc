"""Readers of a config.json: what is absent is as in Transformers, and what cannot be is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from shoal.config.model_config import ModelConfig, load_model_config
from shoal.errors import ModelError

GQA: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
# Architecture -> the class of its configuration.
DECODERS = {
    "GemmaForCausalLM": "GemmaConfig",
    "Gemma2ForCausalLM": "Gemma2Config",
    "Gemma3ForCausalLM": "Gemma3TextConfig",
    "Phi3ForCausalLM": "Phi3Config",
    "GlmForCausalLM": "GlmConfig",
    "Glm4ForCausalLM": "Glm4Config",
}
YARN = {"rope_type": "yarn", "factor": 4.0}


def load(path: Path, architecture: str, **raw: Any) -> ModelConfig:
    (path / "config.json").write_text(json.dumps({"architectures": [architecture], **raw}))
    return load_model_config(path)


@pytest.mark.parametrize("architecture", DECODERS)
def test_sizes_that_are_said_nowhere(tmp_path: Path, architecture: str) -> None:
    expected = getattr(transformers, DECODERS[architecture])()
    stated = {"vocab_size": expected.vocab_size, "num_attention_heads": expected.num_attention_heads}
    found = load(tmp_path, architecture, num_key_value_heads=expected.num_key_value_heads, **stated)
    assert found.hidden_size == expected.hidden_size
    assert found.intermediate_size == expected.intermediate_size
    assert found.num_layers == expected.num_hidden_layers == len(found.sliding_windows)
    assert found.head_dim == (getattr(expected, "head_dim", None) or 96)
    assert found.max_position_embeddings == expected.max_position_embeddings
    assert (found.norm_eps, found.tie_word_embeddings) == (expected.rms_norm_eps, expected.tie_word_embeddings)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("LlamaForCausalLM", {"rms_norm_eps": "small"}, "rms_norm_eps must be a number above 0; found 'small'"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": ["yarn"]}}, "rope_type must be a name; found \\['yarn'\\]"),
        ("LlamaForCausalLM", {"rope_scaling": {**YARN, "factor": 0}}, "yarn needs factor above 0; found 0"),
        ("LlamaForCausalLM", {"rope_scaling": {**YARN, "factor": -4.0}}, "yarn needs factor above 0; found -4.0"),
        ("LlamaForCausalLM", {"rope_scaling": {**YARN, "mscale": "x"}}, "mscale must be a number; found 'x'"),
        (
            "LlamaForCausalLM",
            {"rope_scaling": {**YARN, "original_max_position_embeddings": "4k"}},
            "original_max_position_embeddings must be a positive integer; found '4k'",
        ),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "max_window_layers": "all"},
            "max_window_layers must be an integer from 0 on; found 'all'",
        ),
        ("Qwen2ForCausalLM", {"layer_types": "full"}, "layer_types must be a list of names; found 'full'"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": 5}, "mlp_only_layers must be a list of layers' numbers; found 5"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": ["0"]}, "mlp_only_layers must be a list of layers' numbers"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a number above 0; found 0"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": "x"}, "attn_logit_softcapping must be a number above 0"),
        ("Gemma2ForCausalLM", {"final_logit_softcapping": -1}, "final_logit_softcapping must be a number above 0"),
        ("Gemma3ForCausalLM", {"query_pre_attn_scalar": "x"}, "query_pre_attn_scalar must be a number above 0"),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": "x"}, "sliding_window_pattern must be a positive integer"),
        ("Gemma3ForCausalLM", {"rope_local_base_freq": "x"}, "rope_local_base_freq must be a number above 0"),
        ("GptOssForCausalLM", {"swiglu_limit": 0}, "swiglu_limit must be a number above 0; found 0"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, architecture: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        load(tmp_path, architecture, **{**GQA, **changes})
    assert str(tmp_path / "config.json") in str(error.value)


def test_architectures_that_are_no_list(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**GQA, "architectures": 5}))
    with pytest.raises(ModelError, match="architectures must be a list of names; found 5"):
        load_model_config(tmp_path)
