"""Mistral Small 3.1 and 3.2 (Mistral AI 2025): their text part, which is Mistral's."""

from __future__ import annotations

from shoal.models.llama import MistralForCausalLM
from shoal.models.text_part import TextPart


class Mistral3ForConditionalGeneration(TextPart, MistralForCausalLM):
    pass
