"""The attention of one layer: what happens to its heads before, its scale, its window. The backend does the work."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from shoal.attention.base import AttentionForm, AttentionMetadata, AttentionRefusal, HeadTransform, LayerNeeds
from shoal.errors import ModelError
from shoal.layers.checkpoint import CheckpointTensor
from shoal.layers.context import BuildContext
from shoal.layers.norm import RMSNorm
from shoal.layers.rotary import Angles, RotaryEmbedding


class CacheScales(nn.Module):
    """What the checkpoint of a layer says a cache of 8-bit floats is to be multiplied by: 1 where it says nothing."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix
        self._scales = torch.ones(2)
        self.key = self.value = 1.0

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        for index, name in enumerate(("k_scale", "v_scale")):
            yield CheckpointTensor(
                name=f"{self._prefix}.{name}",
                shape=(1,),
                index=(slice(0, 1),),
                destination=self._scales[index : index + 1],
                kind="norm",
                optional=True,
                fill=lambda tensor, _: tensor.fill_(1.0),
            )

    def process_after_load(self) -> None:
        self.key, self.value = self._scales.tolist()
        if not (self.key > 0 and self.value > 0):
            raise ModelError(f"{self._prefix}: scales of the KV cache must be above 0; found {self._scales.tolist()}")

    def weight_bytes(self) -> int:
        return 0  # two numbers on the host


class Attention(nn.Module):
    """Hq query heads, Hk KV heads of this rank, D head size, T tokens. Heads enter as they are."""

    def __init__(
        self,
        context: BuildContext,
        head_dim: int,
        sliding_window: int | None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        name: str | None = None,
    ) -> None:
        """scale: None is D ** -0.5. softcap, sinks: as in `AttentionForm`; sinks are filled in place at loading.
        name: of the attention in the checkpoint, which may have scales of the KV cache below it. Raises
        AttentionRefusal."""
        super().__init__()
        self.backend = context.attention_backend
        self.head_dim = head_dim
        self._form = AttentionForm(head_dim**-0.5 if scale is None else scale, sliding_window, softcap, sinks)
        self.cache_scales = None if name is None else CacheScales(name)
        _check(context, head_dim, self._form)

    @property
    def form(self) -> AttentionForm:
        scales = self.cache_scales
        if scales is not None and (self._form.key_scale, self._form.value_scale) != (scales.key, scales.value):
            self._form = dataclasses.replace(self._form, key_scale=scales.key, value_scale=scales.value)
        return self._form

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """query [T, Hq, D], key and value [T, Hk, D] -> [T, Hq * D]."""
        return self.backend.forward(query, key, value, kv_cache, metadata, self.form)


class RotaryAttention(Attention):
    """Attention of heads that turn with their position, and are normalised before where the model has norms for it."""

    def __init__(
        self,
        context: BuildContext,
        head_dim: int,
        sliding_window: int | None,
        *,
        num_heads: int,
        num_kv_heads: int,
        rotary: RotaryEmbedding,
        query_norm: RMSNorm | None = None,
        key_norm: RMSNorm | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(context, head_dim, sliding_window, scale=scale, softcap=softcap, sinks=sinks, name=name)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.rotary, self.query_norm, self.key_norm = rotary, query_norm, key_norm
        self.transform = HeadTransform(
            table=rotary.table,
            query_norm=None if query_norm is None else query_norm.weight,
            key_norm=None if key_norm is None else key_norm.weight,
            eps=0.0 if query_norm is None else query_norm.eps,
            interleaved=rotary.interleaved,
        )

    def forward_projected(
        self, projected: torch.Tensor, angles: Angles, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """projected [T, (Hq + 2 Hk) * D]: query, key and value heads -> [T, Hq * D]. angles: of this layer's rotary."""
        assert angles.rotary is self.rotary, "each kind of layer turns by its own table"
        if self.backend.transforms_heads:
            return self.backend.forward_projected(
                projected,
                angles.positions,
                self.transform,
                kv_cache,
                metadata,
                self.form,
                num_heads=self.num_heads,
            )
        heads = projected.view(projected.shape[0], -1, self.head_dim)
        query_key, value = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = query_key.split([self.num_heads, self.num_kv_heads], dim=1)
            query_key = torch.cat([self.query_norm(query), self.key_norm(key)], dim=1)
        query, key = self.rotary.rotate(query_key, angles).split([self.num_heads, self.num_kv_heads], dim=1)
        return self.forward(query, key, value, kv_cache, metadata)


class LatentAttention(nn.Module):
    """Attention to rows that all heads share (DeepSeek-V2, 2024), which the cache holds once, on every rank.

    L numbers of a row, the first value_dim of them its value. Queries enter as they meet the rows: absorbed, rotated.
    """

    def __init__(
        self, context: BuildContext, latent_dim: int, value_dim: int, scale: float, *, name: str | None = None
    ) -> None:
        """name: as in `Attention`; of the two scales the keys' is the rows'. Raises AttentionRefusal."""
        super().__init__()
        self.backend = context.attention_backend
        self.value_dim, self.scale = value_dim, scale
        self.cache_scales = None if name is None else CacheScales(name)
        _check(context, latent_dim, AttentionForm(scale), is_latent=True)

    def forward(
        self, query: torch.Tensor, latent: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """query [T, Hq, L], latent [T, L] -> [T, Hq, value_dim]."""
        scales = self.cache_scales
        return self.backend.forward_latent(
            query,
            latent,
            kv_cache,
            metadata,
            scale=self.scale,
            value_dim=self.value_dim,
            cache_scale=1.0 if scales is None else scales.key,
        )


def _check(context: BuildContext, head_dim: int, form: AttentionForm, *, is_latent: bool = False) -> None:
    """Raise AttentionRefusal where the backend cannot do it."""
    needs = LayerNeeds(
        head_dim=head_dim,
        form=form,
        dtype=context.dtype,
        cache_dtype=context.cache_dtype or context.dtype,
        device=context.device,
        is_latent=is_latent,
    )
    refusal = context.attention_backend.refusal(needs)
    if refusal is not None:
        raise AttentionRefusal(refusal)
