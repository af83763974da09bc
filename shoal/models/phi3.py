"""Phi-3 and Phi-4 (Abdin et al. 2024): Llama with query, key and value stored as one matrix, and gate and up as one;
later ones turn a part of each head only, and stretch angles by factors a pair (longrope)."""

from __future__ import annotations

from shoal.models.llama import LlamaAttention, LlamaForCausalLM, LlamaLayer, LlamaMLP


class Phi3Attention(LlamaAttention):
    qkv_names = "qkv_proj"


class Phi3MLP(LlamaMLP):
    gate_up_names = "gate_up_proj"


class Phi3Layer(LlamaLayer):
    attention_class = Phi3Attention
    mlp_class = Phi3MLP


class Phi3ForCausalLM(LlamaForCausalLM):
    layer_class = Phi3Layer
