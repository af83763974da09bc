"""Checkpoints that see images, too: their text, in both spellings of the names, against Transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from shoal.config.model_config import load_model_config
from shoal.errors import ModelError
from tests.models.paged import PagedModel, random_tokens

TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "max_position_embeddings": 256,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
# Class -> what its config says.
BOTH: dict[str, dict[str, Any]] = {
    "Gemma3ForConditionalGeneration": {
        "model_type": "gemma3",
        "mm_tokens_per_image": 4,
        "text_config": {
            **TEXT,
            "model_type": "gemma3_text",
            "sliding_window": 24,
            "sliding_window_pattern": 3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
    },
    "Mistral3ForConditionalGeneration": {
        "model_type": "mistral3",
        "tie_word_embeddings": False,
        "text_config": {**TEXT, "model_type": "mistral", "rope_theta": 1e9, "sliding_window": None},
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16},
    },
}


def make(path: Path, name: str) -> Any:
    """The model of Transformers, saved."""
    raw = BOTH[name]
    config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(json.loads(json.dumps(raw)))
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.2)
    model.save_pretrained(path)
    (path / "config.json").write_text(json.dumps({**raw, "architectures": [name]}))
    return model


def rename(path: Path, theirs: str, ours: str) -> None:
    tensors = load_file(path / "model.safetensors")
    found = {name.replace(theirs, ours, 1) if name.startswith(theirs) else name: each for name, each in tensors.items()}
    assert found.keys() != tensors.keys()
    save_file(found, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", BOTH)
def test_the_text_is_that_of_the_whole_model(tmp_path: Path, name: str) -> None:
    model, tokens = make(tmp_path, name), random_tokens(60, seed=1, vocab_size=300)
    more = {"token_type_ids": torch.zeros(1, len(tokens), dtype=torch.long)} if name.startswith("Gemma") else {}
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([tokens]), **more).logits[0].float(), dim=-1)
    for chunk in (60, 17):
        found = torch.log_softmax(PagedModel(tmp_path).logits(tokens, chunk), dim=-1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    # As Transformers holds it, in place of how checkpoints are shared.
    rename(tmp_path, "language_model.model.", "model.language_model.")
    found = torch.log_softmax(PagedModel(tmp_path).logits(tokens, 60), dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_tensors_that_are_neither_text_nor_images(tmp_path: Path) -> None:
    make(tmp_path, "Mistral3ForConditionalGeneration")
    rename(tmp_path, "vision_tower.", "audio_tower.")
    with pytest.raises(ModelError, match="unexpected tensor audio_tower"):
        PagedModel(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "text_config must be an object; found None"), ({**TEXT, "model_type": "ministral3"}, "'ministral3' of")],
)
def test_texts_of_other_families_are_refused(tmp_path: Path, text: Any, message: str) -> None:
    raw = {**BOTH["Mistral3ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "architectures": ["Mistral3ForConditionalGeneration"]}))
    with pytest.raises(ModelError, match=message):
        load_model_config(tmp_path)


def test_what_is_said_in_one_of_two_places(tmp_path: Path) -> None:
    raw = {**BOTH["Mistral3ForConditionalGeneration"], "architectures": ["Mistral3ForConditionalGeneration"]}
    raw["text_config"] = {**raw["text_config"], "dtype": "bfloat16", "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": True}))
    config = load_model_config(tmp_path)
    assert (config.dtype, config.tie_word_embeddings) == ("bfloat16", True)
