"""The text part of checkpoints that see images, too: Gemma 3, Mistral Small 3.1. Mixed into the model of the text."""

from __future__ import annotations

from shoal.models.base import CausalLM

_IMAGES = ("vision_tower.", "multi_modal_projector.")


class TextPart(CausalLM):
    # As checkpoints are shared, and as Transformers 5 writes them.
    other_names = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", ""))

    def expects_elsewhere(self, name: str) -> bool:
        return name.removeprefix("model.").startswith(_IMAGES) or super().expects_elsewhere(name)
