"""The families with a file of their own in models/: their model_type, and who reads their config.json.

A family is added here, with its reader beside this file, and in models/registry.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from shoal.config.families.common import Fields
from shoal.config.families.llama import llama_fields
from shoal.config.families.opt import opt_fields


@dataclasses.dataclass(frozen=True)
class Family:
    """read(architecture, config.json) gives the fields of ModelConfig that describe the shape. Raises ModelError."""

    model_type: str
    read: Callable[[str, dict[str, Any]], Fields]


# By architecture, as in config.json.
FAMILIES = {
    "LlamaForCausalLM": Family("llama", llama_fields),
    "MistralForCausalLM": Family("mistral", llama_fields),
    "Qwen2ForCausalLM": Family("qwen2", llama_fields),
    "Qwen3ForCausalLM": Family("qwen3", llama_fields),
    "OPTForCausalLM": Family("opt", opt_fields),
}
SUPPORTED_ARCHITECTURES = {architecture: family.model_type for architecture, family in FAMILIES.items()}
