"""The families with a file of their own in models/: their model_type, and who reads their config.json.

A family is added here, with its reader beside this file, and in models/registry.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from shoal.config.families.bert import bert_fields
from shoal.config.families.common import Fields
from shoal.config.families.decoders import gemma3_fields, gemma_fields, glm_fields, phi3_fields
from shoal.config.families.deepseek import deepseek_fields
from shoal.config.families.gpt_oss import gpt_oss_fields
from shoal.config.families.llama import llama_fields, mistral3_fields
from shoal.config.families.moe import moe_fields
from shoal.config.families.opt import opt_fields
from shoal.config.families.qwen import qwen_fields


@dataclasses.dataclass(frozen=True)
class Family:
    """read(architecture, config.json) gives the fields of ModelConfig that describe the shape. Raises ModelError."""

    model_type: str
    read: Callable[[str, dict[str, Any]], Fields]


# By architecture, as in config.json.
FAMILIES = {
    "LlamaForCausalLM": Family("llama", llama_fields),
    "MistralForCausalLM": Family("mistral", llama_fields),
    "Mistral3ForConditionalGeneration": Family("mistral3", mistral3_fields),
    "MixtralForCausalLM": Family("mixtral", moe_fields),
    "Qwen2ForCausalLM": Family("qwen2", llama_fields),
    "Qwen3ForCausalLM": Family("qwen3", llama_fields),
    "Qwen2MoeForCausalLM": Family("qwen2_moe", moe_fields),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", moe_fields),
    "DeepseekV2ForCausalLM": Family("deepseek_v2", deepseek_fields),
    "DeepseekV3ForCausalLM": Family("deepseek_v3", deepseek_fields),
    "GptOssForCausalLM": Family("gpt_oss", gpt_oss_fields),
    "GemmaForCausalLM": Family("gemma", gemma_fields),
    "Gemma2ForCausalLM": Family("gemma2", gemma_fields),
    "Gemma3ForCausalLM": Family("gemma3_text", gemma3_fields),
    "Gemma3ForConditionalGeneration": Family("gemma3", gemma3_fields),
    "Phi3ForCausalLM": Family("phi3", phi3_fields),
    "GlmForCausalLM": Family("glm", glm_fields),
    "Glm4ForCausalLM": Family("glm4", glm_fields),
    "OPTForCausalLM": Family("opt", opt_fields),
    "QWenLMHeadModel": Family("qwen", qwen_fields),
    "BertModel": Family("bert", bert_fields),
    "BertForSequenceClassification": Family("bert", bert_fields),
    "RobertaModel": Family("roberta", bert_fields),
    "RobertaForSequenceClassification": Family("roberta", bert_fields),
    "XLMRobertaModel": Family("xlm-roberta", bert_fields),
    "XLMRobertaForSequenceClassification": Family("xlm-roberta", bert_fields),
}
ENCODERS = frozenset(architecture for architecture, family in FAMILIES.items() if family.read is bert_fields)
SUPPORTED_ARCHITECTURES = {architecture: family.model_type for architecture, family in FAMILIES.items()}
