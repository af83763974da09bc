"""What every attention backend is: paged KV cache in, one row of heads a token out. Used by layers and the runner.

S sequences and T tokens of a step, B blocks of the longest sequence, Hq query heads, Hk KV heads, D head size.
The tokens of a step lie flat: first all new tokens of sequence 0, then those of sequence 1 …
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from typing import Any

import torch

from shoal.attention.sequences import DeviceSequences
from shoal.errors import ConfigError


class AttentionRefusal(ConfigError):
    """A backend cannot do what a layer needs of it."""


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceRows:
    """S sequences with one new token each, in tensors that a CUDA graph reads anew at each replay.

    table_rows [S]: int32, each sequence's row of `block_tables`. seq_lens [S]: int32, at least 1. Rows that pad the
    graph's size have a table of null blocks and length 1.
    """

    table_rows: torch.Tensor
    seq_lens: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class AttentionForm:
    """What one layer does with the scores of its queries and keys.

    logit = scale * (query · key), then softcap * tanh(logit / softcap) where there is a softcap. A query at position p
    sees the keys at positions max(0, p - sliding_window + 1) … p. sinks [Hq]: fp32, for each query head a logit that
    joins the sum under its softmax and has no value. key_scale, value_scale: what the numbers of a cache of 8-bit
    floats are multiplied by when they are read; caches of wider types ignore them.
    """

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0

    @property
    def is_plain(self) -> bool:
        """Whether it is what everybody's kernels compute."""
        return self.softcap is None and self.sinks is None

    def arguments(self) -> dict[str, Any]:
        """As the kernels of `kernels` take them."""
        return {name: getattr(self, name) for name in _FORM_FIELDS}


_FORM_FIELDS = tuple(field.name for field in dataclasses.fields(AttentionForm))


@dataclasses.dataclass(frozen=True, slots=True)
class HeadTransform:
    """What happens to query and key heads between projection and attention.

    table [P, R]: fp32, cosines of R / 2 angles and then sines, a row a position. The first R of a head's D numbers
    turn, in pairs (a, b) that become (a cos - b sin, b cos + a sin): numbers j and j + R / 2, or `interleaved` 2 j and
    2 j + 1. query_norm, key_norm [D]: RMSNorm weights applied to each head before, or None.
    """

    table: torch.Tensor
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    eps: float = 0.0
    interleaved: bool = False

    @property
    def rotary_dim(self) -> int:
        return self.table.shape[1]


@dataclasses.dataclass(frozen=True, slots=True)
class LayerNeeds:
    """What a layer asks of its backend when it is made. head_dim: D, or L of a layer with a latent cache."""

    head_dim: int
    form: AttentionForm
    dtype: torch.dtype
    cache_dtype: torch.dtype
    device: torch.device
    is_latent: bool = False


@dataclasses.dataclass(slots=True)
class AttentionMetadata:
    """One step, as attention sees it: the same for all layers.

    query_lens, seq_lens: on the host, per sequence: new tokens, and context with the new tokens counted in.
    block_tables [S, B]: int32, block ids by position // block_size; entries past a sequence's end are valid ids, and
    what lies there is finite but not seen.
    slot_mapping [T]: int64, block * block_size + offset, where each new token's key and value go.
    device_rows: a step of one token a sequence whose lengths the device alone knows; device_sequences: one of any
    sequences, likewise, whose tokens behind the last sequence's pad it. query_lens and seq_lens are empty then, and
    block_tables is the table of all slots. Only backends with `follows_device` take these.
    goes_on: its sequences may have keys that each layer writes just before, in the first half of a step.
    plan: what the backend's `prepare` made of it.
    """

    query_lens: list[int]
    seq_lens: list[int]
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    block_size: int
    device_rows: DeviceRows | None = None
    device_sequences: DeviceSequences | None = None
    goes_on: bool = False
    plan: Any = None

    def split(self, num_tokens: int) -> tuple[AttentionMetadata, AttentionMetadata]:
        """The first `num_tokens` tokens and the rest, each as a step of its own, neither prepared nor empty. A sequence
        that is cut goes on in the second: for causal attention, of a step whose sequences the host knows, and in which
        none reads what one behind it writes (`longest_first`)."""
        ends = list(itertools.accumulate(self.query_lens))
        assert 0 < num_tokens < ends[-1] == len(self.slot_mapping)
        last = next(index for index, end in enumerate(ends) if end >= num_tokens)
        left = ends[last] - num_tokens
        following = last if left else last + 1
        first = dataclasses.replace(
            self,
            query_lens=[*self.query_lens[:last], self.query_lens[last] - left],
            seq_lens=[*self.seq_lens[:last], self.seq_lens[last] - left],
            block_tables=self.block_tables[: last + 1],
            slot_mapping=self.slot_mapping[:num_tokens],
            plan=None,
        )
        second = dataclasses.replace(
            self,
            query_lens=[left or self.query_lens[following], *self.query_lens[following + 1 :]],
            seq_lens=self.seq_lens[following:],
            block_tables=self.block_tables[following:],
            slot_mapping=self.slot_mapping[num_tokens:],
            goes_on=True,
            plan=None,
        )
        return first, second


class AttentionBackend(abc.ABC):
    """Causal attention over a paged KV cache. One object serves all layers of a rank.

    It may keep buffers between steps (for CUDA graphs, say); what belongs to one step goes into `metadata.plan`.
    """

    name: str
    # Whether cells behind a sequence's end are read and then masked: what is not a number there would spread, so the
    # runner clears blocks before their first use.
    reads_past_end: bool = True
    # Whether a token sees those behind it, too.
    sees_both_ways: bool = False
    # Whether it takes `AttentionMetadata.device_rows` and `device_sequences`, so that its steps can be captured in
    # CUDA graphs.
    follows_device: bool = False
    # Whether it has `forward_projected`: norms, rotation, cache write and attention from what the projection gives.
    transforms_heads: bool = False

    @abc.abstractmethod
    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """Shape of one layer's cache. Zeros are a valid content; whoever owns the memory fills it so once."""

    @abc.abstractmethod
    def clear_blocks(self, kv_cache: torch.Tensor, blocks: torch.Tensor) -> None:
        """Fill blocks of one layer's cache with zeros; blocks: int64 ids."""

    def latent_cache_shape(self, num_blocks: int, block_size: int, latent_dim: int) -> tuple[int, ...]:
        """Shape of one layer's cache for `forward_latent`: a row of L numbers a token, that all heads share."""
        return (num_blocks, block_size, latent_dim)

    def refusal(self, needs: LayerNeeds) -> str | None:
        """What of these needs it cannot do, with its name; None: it does all of them."""
        return None

    def scratch_bytes(self, num_heads: int, num_kv_heads: int, head_dim: int, max_model_len: int) -> int:
        """Memory that a captured step of decodes takes for itself at most, for one layer of this rank's heads."""
        return 0

    def latent_scratch_bytes(self, num_heads: int, latent_dim: int, max_model_len: int) -> int:
        """The same for `forward_latent`."""
        return 0

    @abc.abstractmethod
    def prepare(self, metadata: AttentionMetadata) -> None:
        """Called once a step, before the first layer: do here whatever all layers share."""

    @abc.abstractmethod
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        form: AttentionForm,
    ) -> torch.Tensor:
        """Write keys and values to their slots, then attend.

        query [T, Hq, D]; key, value [T, Hk, D]; returns [T, Hq * D]. All keys of the step are written before any is
        read.
        """

    def forward_projected(
        self,
        projected: torch.Tensor,
        positions: torch.Tensor,
        transform: HeadTransform,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        form: AttentionForm,
        *,
        num_heads: int,
    ) -> torch.Tensor:
        """As `forward`, with the transform of query and key heads done on the way, where `transforms_heads`.

        projected [T, (Hq + 2 Hk) * D]: query heads, key heads, value heads, contiguous. positions [T]: int64 or int32.
        """
        raise NotImplementedError(f"attention backend {self.name} has no fused transform")

    def forward_latent(
        self,
        query: torch.Tensor,
        latent: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        value_dim: int,
        cache_scale: float = 1.0,
    ) -> torch.Tensor:
        """Write latents to their slots, then attend to them (multi-head latent attention, DeepSeek-V2, 2024).

        query [T, Hq, L], latent [T, L]; returns [T, Hq, value_dim]. A cached row is the key of all heads, and its first
        value_dim numbers are their value. cache_scale: what a cache of 8-bit floats is multiplied by when it is read.
        """
        raise NotImplementedError(f"attention backend {self.name} has no latent cache")
