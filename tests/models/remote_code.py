"""A checkpoint with Python code of its own: Llama under another name, whose attention may ask for more than ours."""

from __future__ import annotations

import json
from pathlib import Path

from tests.checkpoints import make_checkpoint

CODE = """
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaRotaryEmbedding


class ShellConfig(LlamaConfig):
    model_type = "shell"
    variant: str = "plain"


class ShellAttention(LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **more):
        variant = self.config.variant
        if variant == "argument":
            more["alibi"] = torch.ones(1)
        if variant == "mask":
            attention_mask = attention_mask + 1
        if variant == "without":
            return hidden_states, None
        if variant == "twice":
            super().forward(hidden_states, position_embeddings, attention_mask, **more)
        if variant == "later":
            more["is_causal"] = False
        return super().forward(hidden_states, position_embeddings, attention_mask, **more)


class ShellTurns(LlamaRotaryEmbedding):
    pass


class ShellForCausalLM(LlamaForCausalLM):
    config_class = ShellConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.__class__ = ShellAttention
        if config.variant == "turns":
            self.model.rotary_emb.__class__ = ShellTurns
"""


def make_remote(directory: Path, variant: str = "plain") -> Path:
    """Weights and config of a small Llama, called "shell". Returns the directory."""
    make_checkpoint(directory, "llama")
    path = directory / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw |= {"model_type": "shell", "architectures": ["ShellForCausalLM"], "variant": variant}
    raw["auto_map"] = {"AutoConfig": "shell.ShellConfig", "AutoModelForCausalLM": "shell.ShellForCausalLM"}
    path.write_text(json.dumps(raw), encoding="utf-8")
    (directory / "shell.py").write_text(CODE, encoding="utf-8")
    return directory
