"""Bytes of weights against Transformers on the meta device, and against the quantized layouts, computed here anew."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from shoal.cluster.plan.families import known_architectures, read_shape
from shoal.cluster.plan.memory import component_bytes, sum_bytes, token_cache_bytes
from shoal.errors import ConfigError, ModelError
from tests.cluster.plan.models import CONFIGS, MODELS, path_of, write_config
from tests.first_qwen.reference import make_checkpoint

ITEMSIZE = 2

# What checkpoints on the hub say of themselves: metadata.total_size of model.safetensors.index.json.
PUBLISHED = {"Llama-3.1-8B": 16060522496, "Llama-3.1-70B": 141107412992}


def on_meta(config: transformers.PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def hugging_face(raw: dict) -> nn.Module:
    """The model of a config.json, without weights and without its quantization."""
    values = {key: value for key, value in raw.items() if key not in ("quantization_config", "architectures")}
    return on_meta(transformers.AutoConfig.for_model(values.pop("model_type"), **values))


def num_elements(model: nn.Module) -> int:
    """Parameters, each once, and what DeepSeek and GLM keep as buffers of the router, which checkpoints hold."""
    seen = {id(tensor): tensor.numel() for tensor in model.parameters()}
    return sum(seen.values())


def correction_bytes(model: nn.Module) -> int:
    return 4 * sum(each.numel() for name, each in model.named_buffers() if name.endswith("e_score_correction_bias"))


# Transformers takes a quarter of a minute for the largest one, even on the meta device.
LARGEST = "Llama-3.1-405B"
PLAIN = [name for name in MODELS if name not in (LARGEST, "Qwen2.5-32B-Instruct-GPTQ-Int4", "DeepSeek-V3")]


@pytest.mark.parametrize("name", [*PLAIN, pytest.param(LARGEST, marks=pytest.mark.slow)])
def test_plain_weights_are_those_of_transformers_to_the_byte(name):
    shape, quantization = read_shape(path_of(name))
    assert quantization is None
    raw = json.loads((CONFIGS / name / "config.json").read_text())
    expected = ITEMSIZE * num_elements(hugging_face(raw))
    found = component_bytes(shape.parts(), ITEMSIZE)
    assert sum(found.values()) == expected
    if name in PUBLISHED:
        assert expected == PUBLISHED[name]


def test_70b_in_fp16_takes_140_gb_and_its_cache_is_computed():
    shape, _ = read_shape(path_of("Llama-3.1-70B"))
    assert sum_bytes(shape.parts(), ITEMSIZE) == 141_107_412_992
    # 80 layers, keys and values, 8 heads of 128 in two bytes.
    assert token_cache_bytes(shape.layers, ITEMSIZE) == 80 * 2 * 8 * 128 * 2
    assert token_cache_bytes(shape.layers, ITEMSIZE) * 32 * 4096 == 42_949_672_960


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_gptq_weights_are_those_of_its_layout():
    name = "Qwen2.5-32B-Instruct-GPTQ-Int4"
    raw = json.loads((CONFIGS / name / "config.json").read_text())
    model = hugging_face(raw)
    expected, packed = 0, 0
    for module_name, module in linears(model).items():
        if module_name == "lm_head":
            continue
        groups = module.in_features // 128
        tensors = {
            "qweight": torch.empty(module.in_features * 4 // 32, module.out_features, dtype=torch.int32, device="meta"),
            "qzeros": torch.empty(groups, module.out_features * 4 // 32, dtype=torch.int32, device="meta"),
            "scales": torch.empty(groups, module.out_features, dtype=torch.float16, device="meta"),
            "g_idx": torch.empty(module.in_features, dtype=torch.int32, device="meta"),
        }
        expected += sum(tensor.nbytes for tensor in tensors.values())
        packed += module.weight.numel()
    expected += ITEMSIZE * (num_elements(model) - packed)
    shape, quantization = read_shape(path_of(name))
    found = component_bytes(shape.parts(), ITEMSIZE)
    assert sum(found.values()) == expected
    assert quantization is not None and quantization.format.bits == 4
    assert found["g_idx"] == 4 * sum(each.in_features for key, each in linears(model).items() if key != "lm_head")


def test_deepseek_v3_is_that_of_transformers_with_a_scale_for_each_block():
    raw = json.loads((CONFIGS / "DeepSeek-V3" / "config.json").read_text())
    model = hugging_face(raw)

    def held(out_features: int, in_features: int) -> int:
        return out_features * in_features + 4 * math.ceil(out_features / 128) * math.ceil(in_features / 128)

    expected, counted = 0, 0
    for name, module in linears(model).items():
        if name != "lm_head":
            expected += held(module.out_features, module.in_features)
            counted += module.weight.numel()
    for name, tensor in model.named_parameters():
        if ".experts." in name and tensor.dim() == 3:  # Transformers keeps a layer's experts in one tensor
            experts, out_features, in_features = tensor.shape
            halves = 2 if name.endswith("gate_up_proj") else 1
            expected += experts * halves * held(out_features // halves, in_features)
            counted += tensor.numel()
    expected += ITEMSIZE * (num_elements(model) - counted) + correction_bytes(model)
    shape, _ = read_shape(path_of("DeepSeek-V3"))
    found = component_bytes(shape.parts(), ITEMSIZE)
    assert sum(found.values()) == expected
    assert 670e9 < shape.num_parameters < 672e9 and 37e9 < shape.num_active_parameters < 38e9
    # With the layer that predicts a second token, and its own embedding and head: 685 B, as it is published.
    assert round((shape.num_parameters + sum(part.num_parameters for part in shape.apart)) / 1e9, 0) in (684, 685)


def test_gpt_oss_has_its_experts_in_four_bits(tmp_path):
    raw = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "torch_dtype": "bfloat16"}
    raw |= {"vocab_size": 201088, "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64}
    raw |= {"num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 2880, "num_key_value_heads": 8}
    raw |= {"head_dim": 64, "quantization_config": {"quant_method": "mxfp4"}}
    shape, _ = read_shape(write_config(tmp_path, **raw))
    matrices = 24 * 32 * 3 * 2880 * 2880
    biases = 24 * 32 * 3 * 2880
    plain = num_elements(hugging_face(raw)) - matrices - biases
    found = component_bytes(shape.parts(), ITEMSIZE)
    assert sum(found.values()) == ITEMSIZE * (plain + biases) + matrices // 2 + matrices // 32
    # As it is published: 20.9 B, and 3.6 B of them active, where the embedding's table is not counted.
    assert round(shape.num_parameters / 1e9, 1) == 20.9
    assert round((shape.num_active_parameters - 201088 * 2880) / 1e9, 1) == 3.6


SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
NO_HEAD_DIM = SMALL | {"num_key_value_heads": 2, "intermediate_size": 96}
GQA = NO_HEAD_DIM | {"head_dim": 8}
DENSE_FIRST = {
    "n_routed_experts": 8,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "topk_group": 1,
    "n_group": 1,
}
LATENT = (
    SMALL
    | DENSE_FIRST
    | {"num_key_value_heads": 8, "intermediate_size": 96, "num_experts_per_tok": 2, "n_shared_experts": 2}
    | {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
)
OPT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 96,
    "word_embed_proj_dim": 32,
    "do_layer_norm_before": False,
    "max_position_embeddings": 128,
}
SPARSE = {"num_experts": 8, "moe_intermediate_size": 24}
FAMILIES = {
    "mistral": ("MistralForCausalLM", GQA),
    "qwen2": ("Qwen2ForCausalLM", NO_HEAD_DIM | {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3": ("Qwen3ForCausalLM", GQA),
    "llama": ("LlamaForCausalLM", GQA | {"attention_bias": True, "mlp_bias": True}),
    "opt": ("OPTForCausalLM", OPT),
    "gemma": ("GemmaForCausalLM", GQA),
    "gemma2": ("Gemma2ForCausalLM", GQA | {"sliding_window": 64}),
    "gemma3_text": ("Gemma3ForCausalLM", GQA | {"sliding_window": 64}),
    "phi": ("PhiForCausalLM", NO_HEAD_DIM | {"qk_layernorm": True}),
    "phi3": ("Phi3ForCausalLM", NO_HEAD_DIM | {"pad_token_id": 0}),
    "glm": ("GlmForCausalLM", GQA | {"attention_bias": True, "pad_token_id": 0}),
    "glm4": ("Glm4ForCausalLM", GQA | {"attention_bias": True, "pad_token_id": 0}),
    "mixtral": ("MixtralForCausalLM", GQA | {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        NO_HEAD_DIM
        | SPARSE
        | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", GQA | SPARSE | {"mlp_only_layers": [0]}),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        GQA | DENSE_FIRST | {"n_shared_experts": 1, "use_qk_norm": True, "attention_bias": True},
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", LATENT | {"q_lora_rank": None}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", LATENT | {"q_lora_rank": 24}),
    "gpt_oss": ("GptOssForCausalLM", GQA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


# Phi's head has a bias: there is no tied one.
@pytest.mark.parametrize(
    ("family", "tied"),
    [(family, tied) for family in FAMILIES for tied in (False, True) if (family, tied) != ("phi", True)],
)
def test_every_family_has_the_parameters_of_transformers(family, tied, tmp_path):
    architecture, values = FAMILIES[family]
    raw = values | {"tie_word_embeddings": tied, "torch_dtype": "bfloat16", "model_type": family}
    shape, _ = read_shape(write_config(tmp_path, architectures=[architecture], **raw))
    model = hugging_face(raw)
    expected = ITEMSIZE * num_elements(model) + correction_bytes(model)
    assert sum_bytes(shape.parts(), ITEMSIZE) == expected


def test_every_known_architecture_is_compared():
    compared = {architecture for architecture, _ in FAMILIES.values()}
    with_images = {"Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration"}
    assert set(known_architectures()) == compared | with_images | {"QWenLMHeadModel"}


def test_the_first_qwen_has_the_parameters_of_its_checkpoint(tmp_path):
    path = make_checkpoint(tmp_path)
    expected = sum(tensor.numel() for tensor in load_file(path / "model.safetensors").values())
    assert sum_bytes(read_shape(str(path))[0].parts(), ITEMSIZE) == ITEMSIZE * expected


@pytest.mark.parametrize(("family", "kind"), [("Gemma3", "gemma3_text"), ("Mistral3", "mistral")])
def test_of_a_model_that_sees_images_the_text_is_planned(tmp_path, family, kind):
    text = GQA | {"sliding_window": 64, "torch_dtype": "bfloat16", "model_type": kind}
    architecture = "Gemma3ForCausalLM" if family == "Gemma3" else "MistralForCausalLM"
    plain = write_config(tmp_path / "text", architectures=[architecture], **text)
    both = write_config(
        tmp_path / "both",
        architectures=[f"{family}ForConditionalGeneration"],
        model_type=family.lower(),
        text_config=text,
    )
    parts = [sum_bytes(read_shape(path)[0].parts(), ITEMSIZE) for path in (plain, both)]
    assert parts[0] == parts[1]


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    path = write_config(tmp_path, architectures=["MambaForCausalLM"], model_type="mamba")
    with pytest.raises(
        ModelError, match="MambaForCausalLM is not known here; known: LlamaForCausalLM.*DeepseekV3ForCausalLM"
    ):
        read_shape(path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported; supported: gptq, awq, fp8"),
        ({"quant_method": "gptq", "bits": 5}, "bits 5 is not supported; supported: 2, 3, 4, 8"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "two sizes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}, "with a group"),
        ("gptq", "must be an object"),
    ],
)
def test_broken_quantizations_are_refused(given, words, tmp_path):
    path = write_config(tmp_path, architectures=["LlamaForCausalLM"], **GQA, quantization_config=given)
    with pytest.raises(ModelError, match=words):
        read_shape(path)


def test_a_wish_that_contradicts_the_checkpoint_is_refused():
    with pytest.raises(ConfigError, match="--quantization awq contradicts the checkpoint"):
        read_shape(path_of("Qwen2.5-32B-Instruct-GPTQ-Int4"), "awq")
    read_shape(path_of("Qwen2.5-32B-Instruct-GPTQ-Int4"), "gptq_marlin")


LINEARS = [(64, 64), (16, 64), (16, 64), (64, 64), (96, 64), (96, 64), (64, 96)]


def compressed(form="int-quantized", inputs=None, **weights):
    groups = {"group_0": {"weights": weights, "input_activations": inputs}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


def fp8(**values):
    return {"quant_method": "fp8", **values}


@pytest.mark.parametrize(
    ("quantization", "module_bytes"),
    [
        (
            {"quant_method": "awq", "bits": 4, "group_size": 32},
            lambda o, i: i * o // 2 + i // 32 * o // 8 * 4 + i // 32 * o * 2,
        ),
        (fp8(activation_scheme="static"), lambda o, i: o * i + 4 + 4),
        (fp8(weight_block_size=[32, 64]), lambda o, i: o * i + 4 * math.ceil(o / 32) * math.ceil(i / 64)),
        ({"quant_method": "fbgemm_fp8"}, lambda o, i: o * i + 4 * o),
        (compressed(num_bits=8, type="int", strategy="channel"), lambda o, i: o * i + 2 * o),
        (
            compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
            lambda o, i: o * i // 2 + i // 32 * o * 2 + 16,
        ),
        (
            compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
            lambda o, i: o * i // 2 + i // 32 * o * 2 + i // 32 * o // 8 * 4 + 16,
        ),
        (
            compressed("float-quantized", {"dynamic": False}, num_bits=8, type="float", strategy="tensor"),
            lambda o, i: o * i + 2 + 4,
        ),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, lambda o, i: o * i + o // 4 * 4 + 2 * o + 4 * i),
    ],
)
def test_quantized_layouts(quantization, module_bytes, tmp_path):
    raw = GQA | {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    path = write_config(tmp_path, architectures=["LlamaForCausalLM"], **raw, quantization_config=quantization)
    shape, _ = read_shape(path)
    rest = ITEMSIZE * (2 * 320 * 64 + 64 + 4 * 2 * 64)
    expected = rest + 4 * sum(module_bytes(out, inputs) for out, inputs in LINEARS)
    assert sum_bytes(shape.parts(), ITEMSIZE) == expected


def test_modules_that_a_checkpoint_keeps_are_plain(tmp_path):
    raw = GQA | {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    kept = {
        "quant_method": "fp8",
        "modules_to_not_convert": ["model.layers.0.self_attn.q_proj", "re:.*down_proj", "lm_head"],
    }
    path = write_config(tmp_path, architectures=["LlamaForCausalLM"], **raw, quantization_config=kept)
    plain = [
        f"{index}.{part.name}"
        for index, layer in enumerate(read_shape(path)[0].layers)
        for part in layer.parts
        if getattr(part, "format", None) is not None and part.format.is_plain
    ]
    assert plain == ["0.self_attn.q_proj", "0.mlp.down_proj", "1.mlp.down_proj", "2.mlp.down_proj", "3.mlp.down_proj"]


def test_windows_bound_what_is_seen_and_latents_are_small():
    shape, _ = read_shape(path_of("DeepSeek-V3"))
    assert token_cache_bytes(shape.layers, 2) == 61 * (512 + 64) * 2
    # Every tensor-parallel rank has the whole latent.
    assert token_cache_bytes(shape.layers, 2, 8) == token_cache_bytes(shape.layers, 2)
    shape, _ = read_shape(path_of("Qwen3-30B-A3B"))
    assert token_cache_bytes(shape.layers, 2, 8) == 48 * 2 * 128 * 2  # more ranks than heads copy one
    assert token_cache_bytes(shape.layers, 1, 2) == 48 * 2 * 2 * 128
