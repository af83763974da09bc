"""Models by architecture, imported when first asked for. The worker builds through `build_model`."""

from __future__ import annotations

import dataclasses
import importlib

from shoal.config.model_config import SUPPORTED_ARCHITECTURES, ModelConfig
from shoal.errors import ModelError
from shoal.layers.context import BuildContext
from shoal.models.base import CausalLM
from shoal.quantization.registry import create_quantization

_MODELS = {
    "LlamaForCausalLM": ("shoal.models.llama", "LlamaForCausalLM"),
    "MistralForCausalLM": ("shoal.models.llama", "MistralForCausalLM"),
    "Qwen2ForCausalLM": ("shoal.models.qwen2", "Qwen2ForCausalLM"),
    "Qwen3ForCausalLM": ("shoal.models.qwen3", "Qwen3ForCausalLM"),
    "OPTForCausalLM": ("shoal.models.opt", "OPTForCausalLM"),
}
assert _MODELS.keys() == SUPPORTED_ARCHITECTURES.keys()


def build_model(config: ModelConfig, context: BuildContext) -> CausalLM:
    """This rank's part of the model, its weights not yet filled; quantized as its config says.

    Raises ModelError for an unknown architecture, activation or quantization, ConfigError for a degree of tensor
    parallelism that does not divide its layers.
    """
    if config.architecture not in _MODELS:
        raise ModelError(f"architecture {config.architecture!r} is not supported; supported: {', '.join(_MODELS)}")
    assert context.tensor_group.world_size == context.parallel.tensor_size, "the group must be that of the grid"
    context = dataclasses.replace(context, quantization=create_quantization(config.quantization))
    module, class_name = _MODELS[config.architecture]
    model: CausalLM = getattr(importlib.import_module(module), class_name)(config, context)
    return model
