"""Writes the model folder in the Hugging Face layout: two bfloat16 shards, their index, and the configurations."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from .conversations import END_OF_TEXT, TURN_END
from .model import Shape, TinyModel

_NUM_SHARDS = 2


def save_model(model: TinyModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json, generation_config.json and the weights; the output layer is tied, so it is not written."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("_orig_mod.", "")
        tensors[f"model.{name}"] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(_NUM_SHARDS)]
    written = 0
    for name, tensor in tensors.items():
        shards[min(_NUM_SHARDS - 1, written * _NUM_SHARDS // total_bytes)][name] = tensor
        written += tensor.nbytes
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{_NUM_SHARDS:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    end_of_text, turn_end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    _write(folder / "config.json", _config(model.shape, turn_end, end_of_text))
    generation = {
        "do_sample": False,
        "eos_token_id": [turn_end, end_of_text],
        "pad_token_id": end_of_text,
    }
    _write(folder / "generation_config.json", generation)


def _config(shape: Shape, turn_end: int, end_of_text: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "initializer_range": 0.02,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_theta,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": turn_end,
        "pad_token_id": end_of_text,
        "torch_dtype": "bfloat16",
    }


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
