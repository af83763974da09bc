"""Multi-head latent attention (DeepSeek-V2, 2024) in its absorbed form: what stands around `LatentAttention`.

A cached row is a latent of L numbers, from which the keys and values of all heads would be made, and R numbers of a key
that turn. A key's other N numbers are W_K latent: query · (W_K latent) = (W_K^T query) · latent, so W_K is multiplied
into the query, and W_V, likewise, into what the latents give. T tokens, Hq query heads of this rank, V size of a value.
"""

from __future__ import annotations

import dataclasses

import torch

from shoal.attention.base import AttentionMetadata
from shoal.config.families.deepseek import LatentSizes
from shoal.layers.attention import LatentAttention
from shoal.layers.context import BuildContext
from shoal.layers.linear import ColumnLinear
from shoal.layers.rotary import Angles, RotaryEmbedding
from shoal.quantization.base import LinearMethod, LinearSpec
from shoal.quantization.unquantized import Unquantized


class RotaryLatentAttention(LatentAttention):
    """Latent attention whose queries and rows end in numbers that turn with the position."""

    def __init__(
        self,
        context: BuildContext,
        latent_dim: int,
        value_dim: int,
        scale: float,
        *,
        rotary: RotaryEmbedding,
        name: str | None = None,
    ) -> None:
        super().__init__(context, latent_dim, value_dim, scale, name=name)
        self.rotary = rotary

    def forward_turned(
        self,
        query: torch.Tensor,
        query_turning: torch.Tensor,
        latent: torch.Tensor,
        key_turning: torch.Tensor,
        angles: Angles,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """query [T, Hq, L], query_turning [T, Hq, R], latent [T, L], key_turning [T, R] -> [T, Hq, L]."""
        turned = self.rotary.rotate(torch.cat([query_turning, key_turning.unsqueeze(1)], dim=1), angles)
        rows = torch.cat([latent, turned[:, -1]], dim=-1)
        return self(torch.cat([query, turned[:, :-1]], dim=-1), rows, kv_cache, metadata)


class AbsorbedUpProjection(ColumnLinear):
    """kv_b_proj: from latents to the keys and values of all heads. It is never multiplied as that: after loading it is
    taken apart, dequantized if it was quantized."""

    def __init__(self, context: BuildContext, name: str, num_heads: int, sizes: LatentSizes) -> None:
        # What an adapter adds to its products would be missing here.
        alone = dataclasses.replace(context, adapters=None)
        super().__init__(alone, name, sizes.rank, num_heads * (sizes.plain + sizes.value), bias=False)
        self.sizes, self.context = sizes, context
        self.num_heads = num_heads // context.parallel.tensor_size

    def process_after_load(self) -> None:
        sizes = self.sizes
        by_head = self.method.dense_weight().view(self.num_heads, sizes.plain + sizes.value, sizes.rank)
        keys, values = by_head.split([sizes.plain, sizes.value], dim=1)
        self._num_bytes = by_head.nbytes
        if self.deterministic:
            # A product for all heads would have bits that depend on how many there are, and on the rows beside.
            self._key_methods = [self._method(key.T.contiguous()) for key in keys]
            self._value_methods = [self._method(value.contiguous()) for value in values]
        else:
            self.keys = keys.contiguous()  # [Hq, N, L]
            self.values = values.transpose(1, 2).contiguous()  # [Hq, L, V]

    def _method(self, weight: torch.Tensor) -> LinearMethod:
        """weight [outputs, inputs] of one head."""
        outputs, inputs = weight.shape
        spec = LinearSpec(
            in_features=inputs,
            out_features=outputs,
            bias=False,
            dtype=self.context.dtype,
            device=self.context.device,
            deterministic=True,
        )
        method = Unquantized().linear(spec, weight)
        method.process_after_load()
        return method

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """query [T, Hq, N] -> [T, Hq, L], which meets latents as the query meets keys."""
        if self.deterministic:
            return _each_head(self._key_methods, query)
        return torch.bmm(query.transpose(0, 1), self.keys).transpose(0, 1)

    def to_values(self, attended: torch.Tensor) -> torch.Tensor:
        """attended [T, Hq, L], sums of latents -> [T, Hq * V], the same sums of values."""
        if self.deterministic:
            return _each_head(self._value_methods, attended).flatten(1)
        return torch.bmm(attended.transpose(0, 1), self.values).transpose(0, 1).flatten(1)

    def weight_bytes(self) -> int:
        return self._num_bytes


def _each_head(methods: list[LinearMethod], x: torch.Tensor) -> torch.Tensor:
    """x [T, Hq, inputs] -> [T, Hq, outputs]."""
    return torch.stack([method.apply(x[:, head].contiguous()) for head, method in enumerate(methods)], dim=1)
