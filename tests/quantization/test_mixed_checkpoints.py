"""Checkpoints that do not hold all modules alike, and experts: their logits are those of the dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.errors import ModelError
from tests.checkpoints import make_checkpoint
from tests.models.paged import PagedModel, random_tokens
from tests.quantization.integer_writers import by_values, gptq
from tests.quantization.writers import Writer, compressed, fp8_by_channel, fp8_by_tensor, packed, write_quantized
from tests.rank_threads import on_ranks

# Two ranks cut rows of 64 and 32 outputs, 64 and 128 inputs, and experts of 96.
MODEL = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2, "tie_word_embeddings": False}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def _targets(*targets: str) -> dict[str, Any]:
    config = compressed("pack-quantized", INT4)
    config["config_groups"]["group_0"]["targets"] = list(targets)
    return config


def _groups(*groups: dict[str, Any]) -> dict[str, Any]:
    named = {f"group_{index}": group for index, group in enumerate(groups)}
    return compressed("mixed-precision", INT4) | {"config_groups": named}


# name -> (config, writer, what is kept plain, other writers)
FORMS: dict[str, tuple[dict[str, Any], Writer, tuple[str, ...], dict[str, Writer]]] = {
    "gptq-dynamic": (
        GPTQ
        | {
            "dynamic": {
                r"+:.*\.down_proj": {"bits": 8, "group_size": 64},
                r"-:.*\.mlp\.": {},  # of two that match the first counts
                r".*\.self_attn\.o_proj": {"bits": 2, "sym": False},
                # How it was made is no difference to the others of its layer.
                r"+:.*\.q_proj": {"bits": 4, "damp_percent": 0.05},
            }
        },
        gptq(),
        ("lm_head", "gate_proj", "up_proj"),
        {"down_proj": gptq(8, 64), "o_proj": gptq(2, symmetric=False)},
    ),
    "auto-round": (
        {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "bits": 4,
            "group_size": 32,
            "sym": True,
            "block_name_to_quantize": "model.layers",
            "extra_config": {
                **{f"model.layers.{layer}.mlp.down_proj": {"bits": 8, "group_size": 64} for layer in range(4)},
                r"layers\.[0-9]+\.mlp": {"bits": 16},  # what has an entry of its own goes by that
                **{f"model.layers.{layer}.self_attn.o_proj": {"bits": 16, "data_type": "float"} for layer in range(4)},
                r".*self_attn\.[qkv]_proj": {"bits": 2, "sym": False},
            },
        },
        gptq(2, symmetric=False),
        ("lm_head", "gate_proj", "up_proj", "o_proj"),
        {"down_proj": gptq(8, 64)},
    ),
    "gptq-modules-of-a-block": (
        GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj"], ["self_attn.v_proj"]]},
        gptq(),
        ("lm_head", "o_proj", *MLP),
        {},
    ),
    "targets-by-expression": (_targets(r"re:.*\.mlp\..*_proj$"), packed(4, 16), ("lm_head", *ATTENTION), {}),
    "targets-by-name": (_targets("self_attn"), packed(4, 16), ("lm_head", *MLP), {}),
    "two-groups": (
        _groups(
            {"targets": ["Linear"], "format": "pack-quantized", "weights": INT4},
            {"targets": ["re:.*down_proj$", "re:.*self_attn.*"], "format": "float-quantized", "weights": FP8},
        ),
        packed(4, 16),
        ("lm_head",),
        {"self_attn": fp8_by_channel(), "down_proj": fp8_by_channel()},
    ),
    "targets-with-the-head": (_targets("Linear", "lm_head") | {"ignore": []}, packed(4, 16), (), {}),
}


def check(path: Path, reference: Path) -> None:
    tokens = random_tokens(40, seed=1)
    expected = PagedModel(reference).logits(tokens, 40)
    for size in (1, 2):
        for rank in on_ranks(size, lambda group: PagedModel(path, group=group).logits(tokens, 40)):
            torch.testing.assert_close(rank, expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_modules_are_held_as_the_config_says(tmp_path: Path, name: str) -> None:
    config, writer, kept, others = FORMS[name]
    plain = make_checkpoint(tmp_path / "plain", "llama", **MODEL)
    check(write_quantized(plain, tmp_path, config, writer, kept, others), tmp_path / "reference")


def test_a_layer_of_two_groups_is_refused(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", "llama", **MODEL)
    config = _groups(
        {"targets": ["Linear"], "format": "pack-quantized", "weights": INT4},
        {"targets": ["re:.*v_proj$"], "format": "float-quantized", "weights": FP8},
    )
    path = write_quantized(plain, tmp_path, config, packed(4, 16))
    with pytest.raises(ModelError, match="q_proj is .*4-bit int.*v_proj is .*8-bit float.*must be held alike"):
        PagedModel(path)


@pytest.mark.parametrize(
    ("config", "writer"),
    [
        (GPTQ, gptq()),
        (GPTQ | {"group_size": -1}, gptq(group=-1)),
        (GPTQ | {"group_size": 64}, gptq(group=64)),  # of 192 inputs a rank has one and a half
        (compressed("pack-quantized", INT4 | {"group_size": 64}), packed(4, 64)),
        (GPTQ | {"desc_act": True, "sym": False}, gptq(order=by_values, symmetric=False)),
        (compressed("pack-quantized", INT4 | {"actorder": "group"}), packed(4, 16, ordered=True)),
    ],
    ids=["gptq", "gptq-one-group", "gptq-cut", "packed-cut", "gptq-act-order", "packed-act-order"],
)
def test_experts_that_ranks_split(tmp_path: Path, config: dict[str, Any], writer: Writer) -> None:
    plain = make_checkpoint(tmp_path / "plain", "qwen3_moe", **MODEL, moe_intermediate_size=192)
    if config["quant_method"] == "compressed-tensors":
        config = config | {"ignore": ["lm_head", "re:.*mlp.gate$"]}
    check(write_quantized(plain, tmp_path, config, writer, ("lm_head", "mlp.gate.")), tmp_path / "reference")


def test_a_shape_may_be_stored_in_32_bits(tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", "llama", **MODEL)
    path = write_quantized(plain, tmp_path, compressed("pack-quantized", INT4), packed(4, 16))
    tensors = load_file(path / "model.safetensors")
    short = {name: tensor.int() if name.endswith("weight_shape") else tensor for name, tensor in tensors.items()}
    assert any(tensor.dtype is torch.int64 for tensor in tensors.values())
    save_file(short, path / "model.safetensors", metadata={"format": "pt"})
    check(path, tmp_path / "reference")


@pytest.mark.parametrize(
    "suffixes", [("k_proj.k_scale", "v_proj.v_scale"), ("k_proj.output_scale", "v_proj.output_scale")]
)
def test_scales_of_the_cache_by_their_older_names(tmp_path: Path, suffixes: tuple[str, str]) -> None:
    plain = make_checkpoint(tmp_path / "plain", "llama", **MODEL)
    path = write_quantized(plain, tmp_path, {"quant_method": "fp8", "activation_scheme": "dynamic"}, fp8_by_tensor())
    tensors = load_file(path / "model.safetensors")
    for number, suffix in enumerate(suffixes):
        tensors[f"model.layers.1.self_attn.{suffix}"] = torch.tensor(0.5 + number)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    layers = [layer.self_attn.attention.cache_scales for layer in PagedModel(path).model.layers]
    assert [(scales.key, scales.value) for scales in layers[:2]] == [(1.0, 1.0), (0.5, 1.5)]
