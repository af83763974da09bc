"""Mixtures of experts in the config: what their config.json says, and the degrees that they can be cut into."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from shoal.config.engine_config import EngineConfig
from shoal.config.model_config import ExpertsConfig, load_model_config
from shoal.config.parallel import balance_layers
from shoal.config.resolve import make_engine_config
from shoal.errors import ConfigError, ModelError
from tests.config.model_directory import write_model_directory

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 96,
}


def make(tmp_path: Path, changes: dict[str, Any], **options: Any) -> EngineConfig:
    return make_engine_config(**{"model": str(write_model_directory(tmp_path, **changes)), "device": "cpu", **options})


def experts_of(tmp_path: Path, **raw: Any) -> ExpertsConfig:
    found = load_model_config(write_model_directory(tmp_path, **raw)).experts
    assert found is not None
    return found


def test_which_layers_have_experts_and_how_many(tmp_path: Path) -> None:
    assert experts_of(tmp_path, **QWEN3) == ExpertsConfig(
        num_experts=6, num_per_token=3, intermediate_size=96, layers=tuple(range(6))
    )
    some = {**QWEN3, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert experts_of(tmp_path, **some).layers == (1, 5)
    second = {**some, "architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 64}
    assert experts_of(tmp_path, **second).shared_size == 64
    mixtral = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    assert experts_of(tmp_path, **mixtral) == ExpertsConfig(
        num_experts=4, num_per_token=2, intermediate_size=128, layers=(0, 1)
    )


def test_experts_under_the_name_that_transformers_writes_now(tmp_path: Path) -> None:
    raw = {key: value for key, value in QWEN3.items() if key != "num_experts"}
    assert experts_of(tmp_path, **raw, num_local_experts=5).num_experts == 5


def test_more_chosen_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="num_experts_per_tok 7 is more than the 6 experts"):
        experts_of(tmp_path, **{**QWEN3, "num_experts_per_tok": 7})


def test_a_config_survives_the_way_to_the_core(tmp_path: Path) -> None:
    config = make(tmp_path, QWEN3, tensor_parallel_size=2, enable_expert_parallel=True)
    assert config.parallel.expert_parallel
    assert EngineConfig.from_json(config.to_json()) == config


def test_degrees_are_those_of_the_experts(tmp_path: Path) -> None:
    """Its intermediate_size, 128, is that of no layer."""
    odd = {**QWEN3, "moe_intermediate_size": 90}
    with pytest.raises(ConfigError, match=r"KV heads, intermediate size of an expert 90\); these work: 1, 2$"):
        make(tmp_path, odd, tensor_parallel_size=4)
    assert make(tmp_path, odd, tensor_parallel_size=4, enable_expert_parallel=True).parallel.tensor_size == 4
    with pytest.raises(ConfigError, match=r"6 experts to share whole\); these work: 1, 2, 4$"):
        make(tmp_path, odd, tensor_parallel_size=8, enable_expert_parallel=True)
    dense = {**odd, "mlp_only_layers": [0], "intermediate_size": 130}
    with pytest.raises(ConfigError, match=r"intermediate size 130, 6 experts to share whole\); these work: 1, 2$"):
        make(tmp_path, dense, tensor_parallel_size=4, enable_expert_parallel=True)


def test_a_wish_that_changes_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "shoal"):
        dense = make(tmp_path / "dense", {}, tensor_parallel_size=2, enable_expert_parallel=True)
        alone = make(tmp_path / "alone", QWEN3, enable_expert_parallel=True)
    assert not dense.parallel.expert_parallel and not alone.parallel.expert_parallel
    assert "Qwen2ForCausalLM has no experts" in caplog.text
    assert "tensor_parallel_size 1" in caplog.text


def test_replicas_share_no_experts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"over data_parallel_size 2 replicas.*`shoal router`"):
        make(tmp_path, QWEN3, tensor_parallel_size=2, data_parallel_size=2, enable_expert_parallel=True)


def test_deterministic_experts_are_not_split_over_gpus(tmp_path: Path) -> None:
    options = {"device": "cuda", "deterministic": True, "tensor_parallel_size": 2, "dtype": "bfloat16"}
    with pytest.raises(ConfigError, match="does not split experts on a GPU over 2 ranks; with enable_expert_parallel"):
        make(tmp_path, QWEN3, **options)
    assert make(tmp_path, QWEN3, **options, enable_expert_parallel=True).parallel.expert_parallel


def test_stages_are_balanced_by_what_a_token_reads(tmp_path: Path) -> None:
    """Three of six small experts cost less than the dense MLP of the first two layers."""
    raw = {**QWEN3, "mlp_only_layers": [0, 1], "intermediate_size": 4096, "vocab_size": 64}
    model = load_model_config(write_model_directory(tmp_path, **raw))
    assert balance_layers(model, 2) == (1, 5)
