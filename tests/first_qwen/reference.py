"""The first Qwen, written from its paper (arXiv:2309.16609) and config: a plain forward pass in fp32, and a checkpoint
with the original's names, config and tokenizer. Transformers has no code of this family.

T tokens, H hidden size, D head size.
"""

from __future__ import annotations

import base64
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CODE = Path(__file__).with_name("tokenization_qwen.py")
VOCAB_SIZE = 512
# After the byte-level tokens: one that ends documents, two that frame turns, spare ones.
NUM_RANKS = 300
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))

CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "bf16": False,
    "fp16": False,
    "fp32": True,
    "hidden_size": 64,
    "intermediate_size": 224,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 512,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 128,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "torch_dtype": "float32",
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": VOCAB_SIZE,
}
GENERATION = {"chat_format": "chatml", "eos_token_id": NUM_RANKS, "pad_token_id": NUM_RANKS, "top_k": 0, "top_p": 0.8}


def make_checkpoint(directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """config.json, generation_config.json, model.safetensors, the tokenizer; random weights. Returns the directory."""
    config = {**CONFIG, **changes}
    size, width = config["hidden_size"], config["intermediate_size"] // 2
    heads = config["num_attention_heads"] * config["kv_channels"]
    shapes = {"transformer.wte.weight": (VOCAB_SIZE, size), "transformer.ln_f.weight": (size,)}
    shapes["lm_head.weight"] = (VOCAB_SIZE, size)
    for index in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{index}"
        shapes |= {
            f"{layer}.ln_1.weight": (size,),
            f"{layer}.ln_2.weight": (size,),
            f"{layer}.attn.c_attn.weight": (3 * heads, size),
            f"{layer}.attn.c_attn.bias": (3 * heads,),
            f"{layer}.attn.c_proj.weight": (size, heads),
            f"{layer}.mlp.w1.weight": (width, size),
            f"{layer}.mlp.w2.weight": (width, size),
            f"{layer}.mlp.c_proj.weight": (size, width),
        }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        spread = 0.2 if len(shape) == 1 else 0.5 if "wte" in name else 1.5 / shape[1] ** 0.5
        mean = 1.0 if ".ln_" in name else 0.0
        tensors[name] = torch.empty(shape).normal_(mean, spread, generator=generator)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps(GENERATION))
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """Its files: ranks of byte sequences, as tiktoken reads them, and the code that is trusted or not."""
    words = [" the", " of", "th", "he", "in", "er", "你", "好", "北京", "是", "ca", "pital", " is", "Paris", "\n\n"]
    ranks = [bytes([byte]) for byte in range(256)]
    for word in (piece.encode() for piece in words):
        for end in range(2, len(word) + 1):  # every token is two earlier ones joined
            if word[:end] not in ranks:
                ranks.append(word[:end])
    filler = (bytes([97 + i, 97 + j]) for i in range(26) for j in range(26))
    while len(ranks) < NUM_RANKS:
        pair = next(filler)
        if pair not in ranks:
            ranks.append(pair)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks[:NUM_RANKS])]
    (directory / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    shutil.copy(CODE, directory / CODE.name)
    settings = {
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        "model_max_length": 8192,
        "tokenizer_class": "QWenTokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


class Reference:
    """The whole model, one sequence at a time, without a cache."""

    def __init__(self, directory: Path, *, longest: int | None = None) -> None:
        """longest: the length that the stretch of angles is taken for; None: that of the sequence, as the original."""
        from safetensors.torch import load_file

        self.config = json.loads((directory / "config.json").read_text())
        self.weights = load_file(directory / "model.safetensors")
        self.longest = longest

    def logprobs(self, token_ids: list[int]) -> torch.Tensor:
        """[T, V]: of the token after each."""
        config, weights = self.config, self.weights
        stream = weights["transformer.wte.weight"][token_ids]
        for index in range(config["num_hidden_layers"]):
            layer = f"transformer.h.{index}"
            stream = stream + self.attention(layer, self.norm(f"{layer}.ln_1", stream))
            normed = self.norm(f"{layer}.ln_2", stream)
            up, gate = (normed @ weights[f"{layer}.mlp.{name}.weight"].T for name in ("w1", "w2"))
            stream = stream + (up * torch.nn.functional.silu(gate)) @ weights[f"{layer}.mlp.c_proj.weight"].T
        logits = self.norm("transformer.ln_f", stream) @ weights["lm_head.weight"].T
        return torch.log_softmax(logits, dim=-1)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean_square = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean_square + self.config["layer_norm_epsilon"]) * self.weights[f"{name}.weight"]

    def attention(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        config, num_tokens = self.config, x.shape[0]
        projected = x @ self.weights[f"{layer}.attn.c_attn.weight"].T + self.weights[f"{layer}.attn.c_attn.bias"]
        query, key, value = projected.view(num_tokens, 3, -1, config["kv_channels"]).permute(1, 2, 0, 3)
        query, key = self.turn(query), self.turn(key)
        if config["use_logn_attn"]:
            trained = config["seq_length"]
            scales = [max(1.0, math.log(position + 1, trained)) for position in range(num_tokens)]
            query = query * torch.tensor(scales)[None, :, None]
        scores = query @ key.transpose(1, 2) / config["kv_channels"] ** 0.5
        unseen = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
        heads = torch.softmax(scores.masked_fill(unseen, float("-inf")), dim=-1) @ value
        return heads.transpose(0, 1).reshape(num_tokens, -1) @ self.weights[f"{layer}.attn.c_proj.weight"].T

    def turn(self, heads: torch.Tensor) -> torch.Tensor:
        """heads [N, T, D]: pairs (i, i + D / 2) turn by position * base ** (-2 i / D)."""
        num_tokens, size = heads.shape[1:]
        alpha, length = 1, self.longest or num_tokens
        if self.config["use_dynamic_ntk"] and length > self.config["seq_length"]:
            alpha = 2 ** math.ceil(math.log(length / self.config["seq_length"], 2) + 1) - 1
        base = self.config["rotary_emb_base"] * alpha ** (size / (size - 2))
        frequencies = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = torch.arange(num_tokens, dtype=torch.float64)[:, None] * frequencies
        cos, sin = angles.cos().float(), angles.sin().float()
        left, right = heads.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
