"""What a directory of an adapter says, and what is refused of it before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shoal.config.lora import read_adapter
from shoal.errors import InvalidRequestError

PREFIX = "base_model.model.model.layers.0."
DOWN, UP = f"{PREFIX}mlp.up_proj.lora_A.weight", f"{PREFIX}mlp.up_proj.lora_B.weight"
# As PEFT writes it, with all of its keys.
PEFT: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": "some/model", "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 16, "lora_bias": False, "lora_dropout": 0.05, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "qalora_group_size": 16, "r": 8,
    "rank_pattern": {}, "revision": None, "target_modules": ["up_proj"], "target_parameters": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False, "use_qalora": False,
    "use_rslora": False,
}  # fmt: skip


def write(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({**PEFT, **changes}))
    if tensors is None:
        tensors = {DOWN: torch.ones(8, 64), UP: torch.ones(32, 8)}
    save_file(tensors, directory / "adapter_model.safetensors")
    return str(directory)


def test_all_keys_of_peft(tmp_path: Path) -> None:
    facts = read_adapter(write(tmp_path), 16)
    assert (facts.rank, facts.alpha) == (8, 16.0)
    assert facts.scaling("model.layers.0.mlp.up_proj") == 2.0
    assert read_adapter(write(tmp_path, init_lora_weights="gaussian", use_rslora=True), 16).scaling("x") == 16 / 8**0.5


def test_patterns_are_ends_of_names(tmp_path: Path) -> None:
    """The first that matches counts, from a dot on: as in PEFT."""
    tensors = {DOWN: torch.ones(4, 64), UP: torch.ones(32, 4)}
    path = write(
        tmp_path,
        tensors,
        rank_pattern={r"layers\.0\.mlp\.up_proj": 4, "proj": 2},
        alpha_pattern={"up_proj": 6, "model.layers.1.mlp.up_proj": 7, "^down": 9.0},
    )
    facts = read_adapter(path, 16)
    assert [facts.rank_of(f"model.layers.{index}.mlp.up_proj") for index in (0, 1)] == [4, 8]
    assert facts.scaling("model.layers.0.mlp.up_proj") == 6 / 4
    assert facts.scaling("model.layers.1.mlp.up_proj") == 6 / 8
    assert facts.scaling("model.layers.0.mlp.gate_proj") == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"bias": "lora_only"}, "bias 'lora_only' is not supported"),
        ({"lora_bias": True}, "lora_bias True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"init_lora_weights": "pissa_niter_4"}, "it changes the model's own weights"),
        ({"rank_pattern": {"up_proj": "8"}}, "rank_pattern must give positive numbers"),
        ({"rank_pattern": ["up_proj"]}, "rank_pattern must give positive numbers"),
        ({"alpha_pattern": {"up_(proj": 8}}, "alpha_pattern must give positive numbers"),
        ({"alpha_pattern": {"up_proj": 0}}, "alpha_pattern must give positive numbers"),
        ({"rank_pattern": {"gate_proj": 24}}, "has rank 24, and there is room for 16"),
        ({"r": True}, "r must be a positive integer"),
    ],
)
def test_what_the_config_must_not_say(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(message)):
        read_adapter(write(tmp_path, **changes), 16)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({DOWN: torch.ones(8, 64)}, f"{DOWN} has no {UP}"),
        ({UP: torch.ones(32, 8)}, f"{UP} has no {DOWN}"),
        ({DOWN: torch.ones(64), UP: torch.ones(32, 8)}, "matrices of shapes [64] and [32, 8]"),
        ({DOWN: torch.ones(40, 64), UP: torch.ones(32, 40)}, "its rank in adapter_config.json is 8"),
        ({DOWN: torch.ones(8, 64), UP: torch.ones(32, 4)}, "[8, inputs] and [outputs, 8] are wanted"),
        ({DOWN: torch.ones(0, 64), UP: torch.ones(32, 0)}, "matrices of shapes [0, 64] and [32, 0]"),
        ({DOWN: torch.ones(8, 64).int(), UP: torch.ones(32, 8)}, "is of type I32"),
        ({f"{PREFIX}mlp.up_proj.lora_B.bias": torch.ones(8)}, "lora_B.bias is not supported"),
    ],
)
def test_what_the_matrices_must_be(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(message)):
        read_adapter(write(tmp_path, tensors), 16)
