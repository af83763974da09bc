"""Small random checkpoints of models that pool, written by Transformers, and what Transformers makes of texts there."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import processors

from tests.checkpoints import VOCAB_SIZE, byte_level_tokenizer, make_checkpoint


def make_decoder(directory: Path, family: str, *, pooling: str | None = None, **overrides: Any) -> Path:
    """A decoder without a head (`Qwen3Model` …). pooling: of sentence-transformers' files beside it ("mean" …)."""
    source = make_checkpoint(directory / "causal", family, **overrides)
    transformers.AutoModel.from_pretrained(source, dtype=torch.float32).save_pretrained(directory)
    byte_level_tokenizer().save_pretrained(directory)
    if pooling is not None:
        write_modules(directory, pooling)
    return directory


def write_modules(directory: Path, pooling: str, *others: str) -> None:
    """modules.json and 1_Pooling/config.json; others: modules behind them ("Normalize")."""
    kinds = ["Transformer", "Pooling", *others]
    prefix = "sentence_transformers.models."
    modules = [
        {"idx": index, "name": str(index), "path": f"{index}_{kind}" if index else "", "type": prefix + kind}
        for index, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    names = {"lasttoken": "pooling_mode_lasttoken", "mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
    modes = {mode: mode == names.get(pooling, pooling) for mode in (*names.values(), "pooling_mode_max_tokens")}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **modes}))


def write_dense(directory: Path, index: int, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> None:
    """The module Dense of that index in modules.json. weight [outputs, inputs]; activation: a class of torch's."""
    own = directory / f"{index}_Dense"
    own.mkdir(exist_ok=True)
    config = {"out_features": weight.shape[0], "in_features": weight.shape[1], "bias": bias is not None}
    (own / "config.json").write_text(json.dumps({**config, "activation_function": activation}))
    tensors = {"linear.weight": weight} if bias is None else {"linear.weight": weight, "linear.bias": bias}
    save_file(tensors, own / "model.safetensors")


def make_classifier(directory: Path, family: str, *, num_labels: int = 1, **overrides: Any) -> Path:
    """A decoder with a head for scores (`Qwen3ForSequenceClassification` …)."""
    source = make_checkpoint(directory / "causal", family, **overrides)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        source, dtype=torch.float32, num_labels=num_labels
    )
    with torch.no_grad():
        model.score.weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(directory)
    byte_level_tokenizer().save_pretrained(directory)
    return directory


def reference_states(path: Path, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Of each prompt the states [T, H] after the final norm, as Transformers computes them alone."""
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(torch.tensor([list(prompt)])).last_hidden_state[0] for prompt in prompts]


def reference_scores(path: Path, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Of each prompt the scores [L] before any activation."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(torch.tensor([list(prompt)])).logits[0] for prompt in prompts]


def make_encoder(directory: Path, family: str, *, num_labels: int | None = None, **overrides: Any) -> Path:
    """BERT and its kin ("bert", "roberta", "xlm-roberta"), for embeddings, or for scores with num_labels.

    Beside it is a tokenizer that puts special tokens around texts, and tells two segments apart.
    """
    config = transformers.AutoConfig.for_model(
        family, **{
            "vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 112, "max_position_embeddings": 258, "num_labels": num_labels or 2,
            "type_vocab_size": 2 if family == "bert" else 1, "pad_token_id": 0, **overrides,
        }
    )  # fmt: skip
    kind = transformers.AutoModel if num_labels is None else transformers.AutoModelForSequenceClassification
    model = kind.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                spread = 0.5 if "embeddings" in name else 1.5 / parameter.shape[1] ** 0.5
                parameter.normal_(0.0, spread, generator=generator)
            else:
                parameter.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.2, generator=generator)
    model.save_pretrained(directory)
    segmented_tokenizer(family == "bert").save_pretrained(directory)
    return directory


def segmented_tokenizer(tells_segments: bool) -> transformers.PreTrainedTokenizerFast:
    """<|im_start|> text <|im_end|> text <|im_end|>."""
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    second = int(tells_segments)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|>:0 $A:0 <|im_end|>:0",
        pair=f"<|im_start|>:0 $A:0 <|im_end|>:0 $B:{second} <|im_end|>:{second}",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )
    return tokenizer
