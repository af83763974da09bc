"""How a checkpoint's quantization is read: every layout by its own names, and what is wrong refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.config.quantization import QuantizationConfig, read_quantization
from shoal.errors import ConfigError, ModelError

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": False}
AUTO_ROUND: dict[str, Any] = {
    "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 128, "sym": True,
    "data_type": "int", "autoround_version": "0.9.0",
}  # fmt: skip
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head", "re:.*gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
            "input_activations": {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"},
        }
    },
}


def read(found: Any, wanted: str | None = None) -> QuantizationConfig:
    config = read_quantization(found, wanted)
    assert config is not None
    return config


def test_plain_checkpoints() -> None:
    assert read_quantization(None) is None and read_quantization({}) is None
    config = read(None, "fp8")
    assert config.on_the_fly and config.bits == 8 and config.kind == "float"


def test_gptq() -> None:
    config = read(GPTQ, "gptq_marlin")
    assert (config.bits, config.group_size, config.desc_act, config.symmetric) == (4, 128, True, False)
    assert config.input_unit == config.output_unit == 8
    assert config.keeps("lm_head") and not config.keeps("model.layers.0.mlp.up_proj")
    assert not read(GPTQ | {"lm_head": True}).keeps("lm_head")


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_gptq"])
def test_auto_round_packed_like_gptq(packing: str) -> None:
    config = read(AUTO_ROUND | {"packing_format": packing}, "auto-round")
    assert (config.method, config.bits, config.group_size, config.symmetric) == ("gptq", 4, 128, True)
    assert not config.desc_act and config.targets == () and config.describe() == "gptq, 4-bit int, groups of 128"
    assert config.keeps("lm_head") and not config.keeps("model.layers.0.mlp.up_proj")
    extra = {"model.layers.0.mlp.gate": {"bits": 16, "data_type": "float"}, "lm_head": {"bits": 8}}
    mixed = read(AUTO_ROUND | {"extra_config": extra})
    assert mixed.keeps("model.layers.0.mlp.gate") and not mixed.keeps("model.layers.0.mlp.gate_proj")
    assert not mixed.keeps("lm_head") and not mixed.keeps("model.layers.1.mlp.gate")


@pytest.mark.parametrize("blocks", ["model.layers", "model.layers, x.blocks", ["model.layers"], [["model.layers"]]])
@pytest.mark.parametrize("name", ["block_name_to_quantize", "to_quant_block_names"])
def test_auto_round_quantizes_the_blocks_that_it_names(name: str, blocks: Any) -> None:
    config = read(AUTO_ROUND | {name: blocks, "extra_config": {"head.score": {"bits": 8}}})
    assert not config.keeps("model.layers.3.mlp.up_proj") and not config.keeps("head.score")
    assert config.keeps("visual.blocks.0.mlp.up_proj") and config.keeps("lm_head")


def test_awq_in_both_spellings() -> None:
    hub = read({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"})
    own = read({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"})
    assert hub.group_size == own.group_size == 64 and not hub.symmetric
    assert hub.input_unit == 1 and hub.output_unit == 8


def test_fp8() -> None:
    blocks = read({"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["gate"]})
    assert blocks.scales == "block" and blocks.block == (128, 128) and blocks.activations == "dynamic_group"
    assert blocks.keeps("model.layers.3.mlp.gate") and not blocks.keeps("model.layers.3.mlp.gate_proj")
    static = read({"quant_method": "fp8", "activation_scheme": "static"})
    assert (static.scales, static.activations) == ("tensor", "static_tensor")


def test_compressed_tensors() -> None:
    for actorder, is_ordered in (
        (None, False),
        ("weight", False),
        ("static", False),
        ("group", True),
        ("dynamic", True),
    ):
        weights = {"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": actorder}
        config = read(of_group(weights=weights) | {"format": "pack-quantized"})
        assert config.desc_act is is_ordered
        assert (config.input_unit, config.output_unit) == (8, 1)
    weights = {"num_bits": 8, "strategy": "group", "group_size": 32}
    assert read(of_group(weights=weights) | {"format": "int-quantized"}).input_unit == 32
    config = read(COMPRESSED)
    assert (config.kind, config.scales, config.activations) == ("float", "channel", "dynamic_token")
    assert config.keeps("model.layers.0.mlp.gate") and not config.keeps("model.layers.0.mlp.gate_proj")


def of_group(**changes: Any) -> dict[str, Any]:
    (group,) = COMPRESSED["config_groups"].values()
    return COMPRESSED | {"config_groups": {"group_0": group | changes}}


def test_only_what_is_targeted_is_quantized() -> None:
    config = read(of_group(targets=["re:.*\\.experts\\..*", "self_attn.o_proj"]))
    assert not config.keeps("model.layers.0.mlp.experts.3.up_proj")
    assert not config.keeps("model.layers.0.self_attn.o_proj")
    assert config.keeps("model.layers.0.self_attn.q_proj") and config.keeps("lm_head")
    assert read(of_group(targets=["Linear", "lm_head"])).keeps("lm_head"), "ignore names it"
    both = of_group(targets=["Linear", "lm_head"]) | {"ignore": []}
    assert not read(both).keeps("lm_head") and not read(both).keeps("model.layers.0.self_attn.q_proj")
    assert read(COMPRESSED | {"ignore": ["model.layers.0."]}).keeps("model.layers.0.mlp.up_proj")
    blocks = read(GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]], "lm_head": True})
    assert blocks.keeps("model.layers.0.mlp.down_proj") and not blocks.keeps("model.layers.0.mlp.up_proj")
    assert not blocks.keeps("lm_head")


@pytest.mark.parametrize(
    ("found", "wanted", "message"),
    [
        ("gptq", None, "quantization_config must be an object; found 'gptq'"),
        ({"quant_method": "bitsandbytes"}, None, "quant_method 'bitsandbytes' is not supported; supported: gptq, awq"),
        (GPTQ | {"bits": 5}, None, "bits 5 is not supported; supported: 2, 3, 4, 8"),
        (GPTQ | {"bits": "4"}, None, "bits must be an integer; found '4'"),
        (GPTQ | {"bits": None}, None, "bits must be an integer; found None"),
        (GPTQ | {"group_size": 0}, None, "group_size must be -1 or a positive multiple of 8; found 0"),
        (GPTQ | {"sym": "yes"}, None, "sym must be true or false; found 'yes'"),
        (GPTQ | {"checkpoint_format": "marlin"}, None, "checkpoint_format 'marlin' is not supported"),
        (GPTQ, "awq", "--quantization awq contradicts the checkpoint, which is quantized by gptq"),
        (None, "gptq", "--quantization gptq: the checkpoint is not quantized .*`shoal quantize`"),
        ({"quant_method": "awq", "version": "gemv"}, None, "version 'gemv' of AWQ is not supported"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, None, "weight_block_size must be two sizes"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, None, "fmt 'e5m2' is not supported"),
        (COMPRESSED | {"config_groups": {}}, None, "config_groups must be an object with a group; found {}"),
        (COMPRESSED | {"config_groups": {"a": None}}, None, "the config_group a must be an object; found None"),
        (
            COMPRESSED | {"config_groups": COMPRESSED["config_groups"] | {"b": {}}},
            None,
            "config_group b has no weights",
        ),
        (
            COMPRESSED | {"config_groups": {name: COMPRESSED["config_groups"]["group_0"] for name in "ab"}},
            None,
            "several config_groups are for all linear modules",
        ),
        (COMPRESSED | {"format": "marlin-24"}, None, "format 'marlin-24' of compressed-tensors"),
        (COMPRESSED | {"ignore": ["re:*gate["]}, None, r"ignore has '\*gate\[', which is no regular expression"),
        (COMPRESSED | {"ignore": [None]}, None, "ignore must be a list of names"),
        (of_group(weights={"num_bits": 8, "type": "float", "actorder": "x"}), None, "actorder 'x' is not supported"),
        (of_group(targets=3), None, "targets must be a list of names; found 3"),
        (COMPRESSED | {"format": "int-quantized"}, None, "8-bit float weights in format 'int-quantized'"),
        (COMPRESSED | {"format": "pack-quantized"}, None, "8-bit float weights in format 'pack-quantized'"),
        (
            COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            None,
            "sparsity_config .*sparse-24-bitmask",
        ),
        (GPTQ | {"is_marlin_format": True}, None, "is_marlin_format"),
        (
            AUTO_ROUND | {"packing_format": "auto_round:auto_awq"},
            None,
            "packing_format 'auto_round:auto_awq' of auto-round .*supported: auto_round:auto_gptq, auto_gptq",
        ),
        ({"quant_method": "auto-round", "bits": 4}, None, "packing_format None of auto-round is not supported"),
        (AUTO_ROUND | {"data_type": "mx_fp"}, None, "data_type 'mx_fp' of auto-round is not supported; supported: int"),
        (AUTO_ROUND | {"act_bits": 8}, None, "act_bits 8: activations that auto-round quantizes are not supported"),
        (AUTO_ROUND | {"bits": 5}, None, "bits 5 is not supported; supported: 2, 3, 4, 8"),
        (AUTO_ROUND | {"extra_config": ["lm_head"]}, None, "extra_config must be an object of objects"),
        (AUTO_ROUND | {"extra_config": {"*x": {"bits": 8}}}, None, r"extra_config has '\*x', which is no regular"),
        (AUTO_ROUND | {"extra_config": {"x": {"bits": 4, "data_type": "nv_fp"}}}, None, "of 'x': data_type 'nv_fp'"),
        (AUTO_ROUND | {"block_name_to_quantize": [3]}, None, "block_name_to_quantize must be names"),
        (AUTO_ROUND, "awq", "--quantization awq contradicts the checkpoint, which is quantized by auto-round"),
        (GPTQ | {"modules_in_block_to_quantize": [[1]]}, None, "modules_in_block_to_quantize must be a list of names"),
        (COMPRESSED | {"ignore": "lm_head"}, None, "ignore must be a list of names; found 'lm_head'"),
    ],
)
def test_what_is_refused(found: Any, wanted: str | None, message: str) -> None:
    with pytest.raises((ModelError, ConfigError), match=message):
        read_quantization(found, wanted)
