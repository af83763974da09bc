"""The Qwen2 decoder that is trained, with the parameter names of Hugging Face's Qwen2ForCausalLM.

Shapes: B rows, L positions, H hidden, N query heads, K key-value heads, D head size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes of the model."""

    vocabulary: int = 4096
    hidden: int = 256
    ffn: int = 512
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 2
    max_positions: int = 8192
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-6

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden // self.num_heads


class Linear(nn.Linear):
    """A linear layer that keeps float32 weights and computes in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Norm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dim."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (scaled * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_size = shape.num_kv_heads * shape.head_size
        self.q_proj = Linear(shape.hidden, shape.hidden)
        self.k_proj = Linear(shape.hidden, kv_size)
        self.v_proj = Linear(shape.hidden, kv_size)
        self.o_proj = Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Attend within each row: [B, L, H] to [B, L, H]; `cosine` and `sine` are [L, D]."""
        num_rows, length, hidden = x.shape
        query = self.q_proj(x).view(num_rows, length, self.shape.num_heads, -1).transpose(1, 2)
        key = self.k_proj(x).view(num_rows, length, self.shape.num_kv_heads, -1).transpose(1, 2)
        value = self.v_proj(x).view(num_rows, length, self.shape.num_kv_heads, -1).transpose(1, 2)
        query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(num_rows, length, hidden))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to the last dim."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden, shape.norm_epsilon)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden, shape.norm_epsilon)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Attention, then the feed-forward layer, each added to the stream."""
        x = x + self.self_attn(self.input_layernorm(x), cosine, sine)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyModel(nn.Module):
    """The decoder; the output layer is the embedding."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = Norm(shape.hidden, shape.norm_epsilon)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                narrow = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * shape.num_layers) ** 0.5 if narrow else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the last hidden states [B, L, H] for tokens [B, L]."""
        cosine, sine = _rotary_table(self.shape, tokens.shape[1], tokens.device, self.dtype)
        x = self.embed_tokens(tokens).to(self.dtype)
        for layer in self.layers:
            x = layer(x, cosine, sine)
        return self.norm(x)

    def loss(self, tokens: Tensor, is_learnt: Tensor) -> Tensor:
        """Mean cross-entropy of the tokens that `is_learnt` marks, each predicted from those before it."""
        hidden = self(tokens)[:, :-1]
        wanted = is_learnt[:, 1:]
        logits = F.linear(hidden[wanted], self.embed_tokens.weight.to(self.dtype))
        return F.cross_entropy(logits.float(), tokens[:, 1:][wanted])


def _rotary_table(shape: Shape, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    exponent = torch.arange(0, shape.head_size, 2, device=device).float() / shape.head_size
    angle = torch.outer(torch.arange(length, device=device).float(), shape.rope_theta**-exponent).repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions as in Hugging Face's Qwen2: the two halves of a head form the pairs."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine
