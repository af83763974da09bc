"""Models by architecture, imported when first asked for. The worker builds through `build_model`."""

from __future__ import annotations

import dataclasses
import importlib

from shoal.config.model_config import SUPPORTED_ARCHITECTURES, ModelConfig
from shoal.errors import ModelError
from shoal.layers.context import BuildContext
from shoal.models.base import CausalLM
from shoal.models.pooler import attach_pooler
from shoal.quantization.registry import create_quantization

_MODELS = {
    "LlamaForCausalLM": ("shoal.models.llama", "LlamaForCausalLM"),
    "MistralForCausalLM": ("shoal.models.llama", "MistralForCausalLM"),
    "Mistral3ForConditionalGeneration": ("shoal.models.mistral3", "Mistral3ForConditionalGeneration"),
    "MixtralForCausalLM": ("shoal.models.mixtral", "MixtralForCausalLM"),
    "Qwen2ForCausalLM": ("shoal.models.qwen2", "Qwen2ForCausalLM"),
    "Qwen3ForCausalLM": ("shoal.models.qwen3", "Qwen3ForCausalLM"),
    "Qwen2MoeForCausalLM": ("shoal.models.qwen2_moe", "Qwen2MoeForCausalLM"),
    "Qwen3MoeForCausalLM": ("shoal.models.qwen3_moe", "Qwen3MoeForCausalLM"),
    "DeepseekV2ForCausalLM": ("shoal.models.deepseek", "DeepseekForCausalLM"),
    "DeepseekV3ForCausalLM": ("shoal.models.deepseek", "DeepseekForCausalLM"),
    "GptOssForCausalLM": ("shoal.models.gpt_oss", "GptOssForCausalLM"),
    "GemmaForCausalLM": ("shoal.models.gemma", "GemmaForCausalLM"),
    "Gemma2ForCausalLM": ("shoal.models.gemma", "Gemma2ForCausalLM"),
    "Gemma3ForCausalLM": ("shoal.models.gemma", "Gemma3ForCausalLM"),
    "Gemma3ForConditionalGeneration": ("shoal.models.gemma", "Gemma3ForCausalLM"),
    "Phi3ForCausalLM": ("shoal.models.phi3", "Phi3ForCausalLM"),
    "GlmForCausalLM": ("shoal.models.glm", "GlmForCausalLM"),
    "Glm4ForCausalLM": ("shoal.models.glm", "Glm4ForCausalLM"),
    "OPTForCausalLM": ("shoal.models.opt", "OPTForCausalLM"),
    "QWenLMHeadModel": ("shoal.models.qwen", "QwenForCausalLM"),
    "BertModel": ("shoal.models.bert", "BertModel"),
    "BertForSequenceClassification": ("shoal.models.bert", "BertModel"),
    "RobertaModel": ("shoal.models.bert", "BertModel"),
    "RobertaForSequenceClassification": ("shoal.models.bert", "BertModel"),
    "XLMRobertaModel": ("shoal.models.bert", "BertModel"),
    "XLMRobertaForSequenceClassification": ("shoal.models.bert", "BertModel"),
}
assert _MODELS.keys() == SUPPORTED_ARCHITECTURES.keys()
# By Transformers' own code. It takes seconds to import, so native families never load it.
_TRANSFORMERS = ("shoal.models.transformers_fallback", "TransformersForCausalLM")


def build_model(config: ModelConfig, context: BuildContext) -> CausalLM:
    """This rank's part of the model, its weights not yet filled; quantized as its config says.

    Raises ModelError for an unknown architecture, activation or quantization, ConfigError for a degree of tensor
    parallelism that does not divide its layers.
    """
    by_transformers = config.model_impl == "transformers"
    if config.architecture not in _MODELS and not by_transformers:
        raise ModelError(f"architecture {config.architecture!r} is not supported; supported: {', '.join(_MODELS)}")
    assert context.tensor_group.world_size == context.parallel.tensor_size, "the group must be that of the grid"
    context = dataclasses.replace(context, quantization=create_quantization(config.quantization))
    module, class_name = _TRANSFORMERS if by_transformers else _MODELS[config.architecture]
    model: CausalLM = getattr(importlib.import_module(module), class_name)(config, context)
    if config.pooling is not None:
        attach_pooler(model, config, config.pooling, context)
    return model
