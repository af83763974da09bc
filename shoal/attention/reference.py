"""Attention written out plainly, one sequence and one position list at a time: what the fast backends are tested by.

Hq query heads, Hk KV heads, G = Hq / Hk, D head size, Q new tokens and C context tokens of one sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from shoal.attention.base import AttentionBackend, AttentionForm, AttentionMetadata
from shoal.attention.cache_dtype import cells, decode, encode, scale_values, score_scale


class ReferenceAttention(AttentionBackend):
    """Slow and obviously right. Computes in float64. Cache: [2, num_blocks, block_size, Hk, D], keys then values."""

    name = "reference"
    reads_past_end = False
    follows_device = True

    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return (2, num_blocks, block_size, num_kv_heads, head_dim)

    def clear_blocks(self, kv_cache: torch.Tensor, blocks: torch.Tensor) -> None:
        cells(kv_cache).index_fill_(0 if kv_cache.dim() == 3 else 1, blocks, 0)

    def prepare(self, metadata: AttentionMetadata) -> None:
        rows = metadata.device_rows
        if rows is not None:  # by looking at them: nothing for a graph
            metadata.seq_lens = rows.seq_lens.tolist()
            metadata.query_lens = [1] * len(metadata.seq_lens)
            metadata.block_tables = metadata.block_tables[rows.table_rows.long()]
        sequences = metadata.device_sequences
        if sequences is not None:
            table_rows, _, num_new, lengths = torch.from_numpy(sequences.sequences)
            metadata.query_lens, metadata.seq_lens = num_new.tolist(), lengths.tolist()
            metadata.block_tables = metadata.block_tables[table_rows.to(metadata.block_tables.device)]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        form: AttentionForm,
    ) -> torch.Tensor:
        keys, values = cells(kv_cache).flatten(1, 2).unbind(0)  # [slots, Hk, D]
        keys[metadata.slot_mapping] = encode(key, kv_cache, form.key_scale)
        values[metadata.slot_mapping] = encode(value, kv_cache, form.value_scale)
        form = dataclasses.replace(form, scale=score_scale(form, kv_cache))
        outputs = [
            _attend(
                query[tokens],
                decode(keys[slots], kv_cache, query.dtype),
                decode(values[slots], kv_cache, query.dtype),
                form,
            )
            for tokens, slots in _sequences(metadata)
        ]
        return scale_values(_padded(outputs, query), form, kv_cache).to(query.dtype).flatten(1)

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
        rows = cells(kv_cache).flatten(0, 1)  # [slots, L]
        rows[metadata.slot_mapping] = encode(latent, kv_cache, cache_scale)
        form = AttentionForm(scale, key_scale=cache_scale, value_scale=cache_scale)
        form = dataclasses.replace(form, scale=score_scale(form, kv_cache))
        outputs = []
        for tokens, slots in _sequences(metadata):
            keys = decode(rows[slots], kv_cache, query.dtype)[:, None]  # one KV head
            outputs.append(_attend(query[tokens], keys, keys[..., :value_dim], form))
        return scale_values(_padded(outputs, query), form, kv_cache).to(query.dtype)


def _sequences(metadata: AttentionMetadata) -> Iterator[tuple[slice, torch.Tensor]]:
    """Of each sequence: its new tokens among the T, and the slots of its context."""
    start = 0
    for row, (num_new, context) in enumerate(zip(metadata.query_lens, metadata.seq_lens, strict=True)):
        positions = torch.arange(context, device=metadata.block_tables.device)
        blocks = metadata.block_tables[row].long()[positions // metadata.block_size]
        yield slice(start, start + num_new), blocks * metadata.block_size + positions % metadata.block_size
        start += num_new


def _padded(outputs: list[torch.Tensor], query: torch.Tensor) -> torch.Tensor:
    """Of all sequences, and zeros for tokens that pad the step."""
    attended = torch.cat(outputs)
    return torch.cat([attended, attended.new_zeros(len(query) - len(attended), *attended.shape[1:])])


def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, form: AttentionForm) -> torch.Tensor:
    """query [Q, Hq, D] are the last Q positions of keys and values [C, Hk, D]; returns [Q, Hq, D] in float64."""
    num_new, num_heads, _ = query.shape
    context, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    keys = keys.double().repeat_interleave(group, dim=1)
    values = values.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,chd->hqc", query.double(), keys) * form.scale
    if form.softcap is not None:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    query_position = torch.arange(context - num_new, context, device=query.device)[:, None]
    key_position = torch.arange(context, device=query.device)[None, :]
    visible = key_position <= query_position
    if form.sliding_window is not None:
        visible &= key_position > query_position - form.sliding_window
    scores = scores.masked_fill(~visible, float("-inf"))
    if form.sinks is not None:
        sinks = form.sinks.double()[:, None, None].expand(-1, num_new, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :context]
    return torch.einsum("hqc,chd->qhd", weights, values)
