"""Scalings of rotary embeddings against Transformers' functions; heads that turn in part, or in pairs side by side."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shoal.config.rope import RopeConfig, parse_rope
from shoal.errors import ModelError
from shoal.layers.rotary import RotaryEmbedding, inverse_frequencies

CPU = torch.device("cpu")
FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(24)], "long_factor": [2.0 + i for i in range(24)]}
# config.json, beside max_position_embeddings 2048, heads of 64 and theta 20000.
CONFIGS: dict[str, dict[str, Any]] = {
    "phi-3": {
        "rope_scaling": {"type": "longrope", **FACTORS},
        "original_max_position_embeddings": 512,
        "partial_rotary_factor": 0.75,
    },
    "phi-3-su": {
        "rope_scaling": {"type": "su", **FACTORS},
        "original_max_position_embeddings": 512,
        "partial_rotary_factor": 0.75,
    },
    "longrope-given": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 20000.0,
            "partial_rotary_factor": 0.75,
            "attention_factor": 1.25,
            "original_max_position_embeddings": 512,
            **FACTORS,
        },
        "original_max_position_embeddings": 512,  # as Phi-3's configs have it too, whose class has a default
    },
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 3.0}},
    "dynamic-partial": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "partial_rotary_factor": 0.5},
    "deepseek": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "mscale": 0.707,
            "mscale_all_dim": 0.5,
            "beta_fast": 32,
            "beta_slow": 1,
        }
    },
    "partial": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_positions", [512, 513, 2048, 5000])
def test_frequencies_are_transformers(name: str, num_positions: int) -> None:
    changes = {"max_position_embeddings": 2048, "rope_theta": 20000.0, **CONFIGS[name]}
    rope = parse_rope(changes, 2048, allows_partial=True)
    theirs = copy.deepcopy(changes)  # they change it
    if theirs.get("rope_scaling", {}).get("type") == "su":  # their configuration class renames it
        theirs["rope_scaling"] = {**theirs["rope_scaling"], "type": "longrope"}
    kind = transformers.Phi3Config if rope.scaling == "longrope" else transformers.LlamaConfig
    config = kind(hidden_size=256, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, **theirs)
    rotary_dim = int(64 * rope.partial)
    found, factor = inverse_frequencies(rope, rotary_dim, num_positions)
    if rope.scaling is None:
        expected, expected_factor = 1 / 20000.0 ** (torch.arange(0, rotary_dim, 2) / rotary_dim), 1.0
    else:
        expected, expected_factor = ROPE_INIT_FUNCTIONS[rope.scaling](config, CPU, seq_len=num_positions)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert factor == pytest.approx(expected_factor)


def test_deepseeks_softmax_factor() -> None:
    """(0.1 * mscale_all_dim * ln(factor) + 1) squared; 1 for the others."""
    rope = parse_rope(CONFIGS["deepseek"], 2048)
    assert rope.softmax_factor == pytest.approx((0.1 * 0.5 * 1.3862943611) ** 2 + 2 * 0.1 * 0.5 * 1.3862943611 + 1)
    assert parse_rope({}, 2048).softmax_factor == 1.0


def test_qwens_own_dynamic_scaling() -> None:
    """theta times (2 ** ceil(log2(length / 2048) + 1) - 1) ** (D / (D - 2)) beyond 2048 positions."""
    rope = RopeConfig(theta=10000.0, scaling="qwen_dynamic", parameters={"original_max_position_embeddings": 2048})
    plain = RopeConfig(theta=10000.0, scaling=None, parameters={})
    for num_positions, alpha in ((2048, 1), (2049, 3), (4096, 3), (4097, 7), (8192, 7)):
        expected, _ = inverse_frequencies(
            RopeConfig(theta=10000.0 * alpha ** (64 / 62), scaling=None, parameters={}), 64
        )
        torch.testing.assert_close(inverse_frequencies(rope, 64, num_positions)[0], expected)
    assert torch.equal(inverse_frequencies(rope, 64, 100)[0], inverse_frequencies(plain, 64)[0])


@pytest.mark.parametrize("rotary_dim", [32, 16])
def test_side_by_side_is_glms(rotary_dim: int) -> None:
    from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb

    config = RopeConfig(theta=10000.0, scaling=None, parameters={}, partial=rotary_dim / 32)
    rotary = RotaryEmbedding(config, 32, 40, CPU, interleaved=True)
    assert rotary.rotary_dim == rotary_dim and rotary.table.shape == (40, rotary_dim)
    query, key = torch.randn(1, 3, 40, 32), torch.randn(1, 2, 40, 32)
    cos, sin = (torch.cat([half, half], dim=-1)[None] for half in rotary.table.chunk(2, dim=-1))
    angles = rotary.lookup(torch.arange(40))
    for heads, expected in zip((query, key), apply_rotary_pos_emb(query, key, cos, sin), strict=True):
        found = rotary.rotate(heads[0].transpose(0, 1), angles).transpose(0, 1)
        torch.testing.assert_close(found, expected[0])


def test_half_of_a_head_is_phis() -> None:
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    rotary = RotaryEmbedding(RopeConfig(theta=10000.0, scaling=None, parameters={}, partial=0.5), 32, 40, CPU)
    query = torch.randn(1, 3, 40, 32)
    cos, sin = (torch.cat([half, half], dim=-1)[None] for half in rotary.table.chunk(2, dim=-1))
    expected, _ = apply_rotary_pos_emb(query, query, cos, sin)
    found = rotary.rotate(query[0].transpose(0, 1), rotary.lookup(torch.arange(40))).transpose(0, 1)
    torch.testing.assert_close(found, expected[0])


def test_what_cannot_be() -> None:
    with pytest.raises(ModelError, match="partial_rotary_factor 0.5 is not supported; only 1.0 is"):
        parse_rope({"partial_rotary_factor": 0.5}, 100)
    with pytest.raises(ModelError, match="must be above 0 and at most 1; found 2"):
        parse_rope({"partial_rotary_factor": 2}, 100, allows_partial=True)
    with pytest.raises(ModelError, match="longrope needs long_factor, a list of numbers above 0; found None"):
        parse_rope({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, 100)
    nested = {"rope_parameters": {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_theta": 7.0}}}
    assert parse_rope(nested, 100, layer_type="sliding_attention").theta == 7.0
    with pytest.raises(ModelError, match="no set for 'chunked' layers; found: full_attention, sliding_attention"):
        parse_rope(nested, 100, layer_type="chunked")
    plain = RopeConfig(theta=10000.0, scaling=None, parameters={})
    with pytest.raises(ModelError, match="7 numbers of a head of 32 cannot turn"):
        RotaryEmbedding(plain, 32, 10, CPU, rotary_dim=7)
    longrope = parse_rope(CONFIGS["phi-3"], 2048, allows_partial=True)
    with pytest.raises(ModelError, match="24 factors for the 16 pairs"):
        inverse_frequencies(longrope, 32)
