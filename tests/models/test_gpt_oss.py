"""gpt-oss over ranks that share experts whole, stages, and in deterministic mode. Its MXFP4 checkpoints:
tests/quantization/test_mxfp4.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shoal.config.model_config import load_model_config
from shoal.errors import ConfigError, ModelError
from tests.checkpoints import make_checkpoint, make_variant
from tests.models.experts_on_ranks import check_stages, check_whole_experts, logits_at
from tests.models.paged import PagedModel, random_tokens
from tests.rank_threads import on_ranks

TOKENS = random_tokens(60, seed=1)
SIZES = {"num_attention_heads": 8, "hidden_size": 128, "num_local_experts": 7}


def test_ranks_share_experts_whole(tmp_path: Path) -> None:
    check_whole_experts(make_checkpoint(tmp_path, "gpt_oss", **SIZES))


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_stages_of_two_ranks(tmp_path: Path, expert_parallel: bool) -> None:
    check_stages(make_checkpoint(tmp_path, "gpt_oss", num_hidden_layers=3, **SIZES), TOKENS, expert_parallel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_bits_do_not_depend_on_ranks(tmp_path: Path, dtype: torch.dtype) -> None:
    path = make_checkpoint(tmp_path, "gpt_oss", dtype=dtype, **SIZES)
    (expected,) = logits_at(path, 1, "deterministic", False, dtype)
    assert expected.isfinite().all()
    for size in (2, 4):
        for rank in logits_at(path, size, "deterministic", True, dtype):
            assert torch.equal(rank, expected), size
    with pytest.raises(ConfigError, match="does not split experts with biases"):
        logits_at(path, 2, "deterministic", False, dtype)


def test_sinks_matter_and_are_split_by_heads(tmp_path: Path) -> None:
    path = make_variant(tmp_path, "gpt-oss")
    model = PagedModel(path)
    expected = model.logits(TOKENS, 60)
    sinks = [layer.self_attn.sinks.logits for layer in model.model.layers]
    halves = on_ranks(
        2, lambda group: [layer.self_attn.sinks.logits for layer in PagedModel(path, group=group).model.layers]
    )
    for index, whole in enumerate(sinks):
        assert whole.shape == (4,) and torch.equal(torch.cat([half[index] for half in halves]), whole)
        whole.fill_(-30.0)
    assert (model.logits(TOKENS, 60) - expected).abs().max() > 0.01


def test_the_first_configs(tmp_path: Path) -> None:
    """As they lie on the hub: rope_scaling, experts_per_token beside the usual name, no rope_parameters."""
    raw = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "torch_dtype": "bfloat16"}
    raw |= {"num_hidden_layers": 24, "num_local_experts": 32, "experts_per_token": 4, "rope_theta": 150000}
    raw |= {"hidden_size": 2880, "vocab_size": 201088, "initial_context_length": 4096, "sliding_window": 128}
    raw["rope_scaling"] = {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = load_model_config(tmp_path)
    assert config.sliding_windows[:3] == (128, None, 128) and config.experts is not None
    assert (config.experts.num_per_token, config.num_kv_heads, config.head_dim) == (4, 8, 64)
    assert config.rope is not None and config.rope.theta == 150000 and config.rope.parameters["truncate"] is False
    assert config.max_position_embeddings == 131072
    (tmp_path / "config.json").write_text(json.dumps(raw | {"swiglu_limit": 0}))
    with pytest.raises(ModelError, match="swiglu_limit must be a number above 0"):
        load_model_config(tmp_path)
