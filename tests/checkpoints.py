"""Small random checkpoints of every family, written by Hugging Face Transformers: for tests from the layers to HTTP."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 512
FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "opt")
_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 512,
}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 64,
}
# Families in all the forms that their code tells apart: name -> (family, changes of its config).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha-tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1, "head_dim": 20, "hidden_act": "gelu"}),
    "llama-llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "qwen2-some-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 2, "num_hidden_layers": 3},
    ),
    "qwen2-yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 16.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
                "truncate": False,
            }
        },
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    "qwen3-biases-tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {}),
    "mixtral-window": ("mixtral", {"sliding_window": 24, "num_local_experts": 5, "num_experts_per_tok": 3}),
    "qwen2-moe": ("qwen2_moe", {}),
    "qwen2-moe-some-dense": (
        "qwen2_moe",
        {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": True},
    ),
    "qwen2-moe-some-windows": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 2, "num_hidden_layers": 3},
    ),
    "qwen3-moe": ("qwen3_moe", {}),
    "qwen3-moe-not-normalized": ("qwen3_moe", {"norm_topk_prob": False, "num_experts": 11, "attention_bias": True}),
    "deepseek-v2": ("deepseek_v2", {}),
    "deepseek-v2-groups": (
        "deepseek_v2",
        {"q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "head_dim": 8},
    ),
    "deepseek-v2-yarn": (
        "deepseek_v2",
        {"first_k_dense_replace": 0, "attention_bias": True, "routed_scaling_factor": 2.0, "rope_parameters": _YARN},
    ),
    "deepseek-v3": ("deepseek_v3", {}),
    "deepseek-v3-yarn": ("deepseek_v3", {"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "deepseek-v3-one-group": (
        "deepseek_v3",
        {"n_group": 1, "topk_group": 1, "n_routed_experts": 7, "norm_topk_prob": False, "rope_interleave": False},
    ),
    "gpt-oss": ("gpt_oss", {}),
    "gpt-oss-other-windows": (
        "gpt_oss",
        {
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "num_local_experts": 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma2-no-caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 32}),
    "gemma3": ("gemma3", {"num_hidden_layers": 3}),
    "gemma3-linear": (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
    ),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 33, "num_key_value_heads": 4}),
    "phi4-mini": ("phi3", {"tie_word_embeddings": True, "rope_parameters": _LONGROPE}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4-no-biases": ("glm4", {"attention_bias": False, "tie_word_embeddings": True}),
    "opt": ("opt", {}),
    "opt-350m-form": ("opt", {"word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    "opt-odd-heads-untied": ("opt", {"hidden_size": 60, "tie_word_embeddings": False}),
    "opt-bare": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
}

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED: dict[str, Any] = {"intermediate_size": 112, "num_key_value_heads": 2}
_LATENT: dict[str, Any] = {
    "intermediate_size": 112,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
}
_FAMILY: dict[str, tuple[type[transformers.PretrainedConfig], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, _GATED),
    "mistral": (transformers.MistralConfig, {**_GATED, "sliding_window": 64, "head_dim": 32}),
    "qwen2": (transformers.Qwen2Config, {**_GATED, "tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {**_GATED, "head_dim": 32}),
    "mixtral": (transformers.MixtralConfig, {**_GATED, "num_local_experts": 6}),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        {**_GATED, "num_experts": 6, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80},
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {
            **_GATED,
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
    "deepseek_v2": (
        transformers.DeepseekV2Config,
        {**_LATENT, "n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 2},
    ),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        {**_LATENT, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2},
    ),
    "gpt_oss": (
        transformers.GptOssConfig,
        {
            **_GATED,
            "head_dim": 16,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": 40,
            "swiglu_limit": 1.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 8.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "gemma": (transformers.GemmaConfig, {**_GATED, "head_dim": 32}),
    "gemma2": (
        transformers.Gemma2Config,
        {**_GATED, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 40, "attn_logit_softcapping": 5.0},
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {**_GATED, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 40, "sliding_window_pattern": 2},
    ),
    "phi3": (transformers.Phi3Config, {**_GATED, "original_max_position_embeddings": 512}),
    "glm": (transformers.GlmConfig, {**_GATED, "head_dim": 16}),
    "glm4": (transformers.Glm4Config, {**_GATED, "head_dim": 16}),
    "opt": (transformers.OPTConfig, {"ffn_dim": 112, "word_embed_proj_dim": None}),
}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? It is Paris.",
    "给我推荐中国适合旅游的地方。北京、上海、西安和成都都很好，你好！",
    "0 1 2 3 4 5 6 7 8 9 10 11 12",
]


def make_checkpoint(
    directory: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write config.json, safetensors, generation_config.json and a tokenizer with a chat template to `directory`.

    family: one of FAMILIES; overrides are keys of its configuration. Weights are random, biases and norms as well, and
    so large that log-probabilities differ by whole numbers. Returns the directory.
    """
    config_class, defaults = _FAMILY[family]
    model = transformers.AutoModelForCausalLM.from_config(
        config_class(**{**_COMMON, **defaults, **overrides}), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                spread = 0.5 if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5
                parameter.normal_(0.0, spread, generator=generator)
            else:
                is_norm = name.endswith("norm.weight")
                parameter.normal_(1.0 if is_norm else 0.0, 0.2, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2, generator=generator)
    directory.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    byte_level_tokenizer().save_pretrained(directory)
    return directory


def make_variant(directory: Path, variant: str) -> Path:
    """The checkpoint of one of VARIANTS."""
    family, overrides = VARIANTS[variant]
    return make_checkpoint(directory, family, **overrides)


@functools.cache
def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of fewer than VOCAB_SIZE tokens that can write any text: ids 0, 1, 2 are special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        show_progress=False,
        vocab_size=VOCAB_SIZE - 12,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
