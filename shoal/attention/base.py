"""What every attention backend is: paged KV cache in, one row of heads a token out. Used by layers and the runner.

S sequences and T tokens of a step, B blocks of the longest sequence, Hq query heads, Hk KV heads, D head size.
The tokens of a step lie flat: first all new tokens of sequence 0, then those of sequence 1 …
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(slots=True)
class AttentionMetadata:
    """One step, as attention sees it: the same for all layers.

    query_lens, seq_lens: on the host, per sequence: new tokens, and context with the new tokens counted in.
    block_tables [S, B]: int32, block ids by position // block_size; entries past a sequence's end are valid ids, and
    what lies there is finite but not seen.
    slot_mapping [T]: int64, block * block_size + offset, where each new token's key and value go.
    plan: what the backend's `prepare` made of it.
    """

    query_lens: list[int]
    seq_lens: list[int]
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    block_size: int
    plan: Any = None


class AttentionBackend(abc.ABC):
    """Causal attention over a paged KV cache. One object serves all layers of a rank.

    It may keep buffers between steps (for CUDA graphs, say); what belongs to one step goes into `metadata.plan`.
    """

    name: str
    # Whether cells behind a sequence's end are read and then masked: what is not a number there would spread, so the
    # runner clears blocks before their first use.
    reads_past_end: bool = True

    @abc.abstractmethod
    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """Shape of one layer's cache. Zeros are a valid content; whoever owns the memory fills it so once."""

    @abc.abstractmethod
    def clear_blocks(self, kv_cache: torch.Tensor, blocks: torch.Tensor) -> None:
        """Fill blocks of one layer's cache with zeros; blocks: int64 ids."""

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
        *,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        """Write keys and values to their slots, then attend.

        query [T, Hq, D]; key, value [T, Hk, D]; returns [T, Hq * D]. A query at position p sees the keys at positions
        max(0, p - sliding_window + 1) … p. All keys of the step are written before any is read.
        """
