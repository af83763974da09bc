"""Attention whose result for a query row has the same bits in any batch, chunking, prefix hit or padding. CPU only.

Every new token is a query of its own, in a product of fixed shape: its GQA group against the context padded to whole
splits of KV_SPLIT keys. The kernel (PyTorch's flash attention for CPU) walks the splits in order, one thread for a
(query, KV head); a split that is masked entirely leaves its running maximum, sum and output as they are, so padding
changes nothing. Computed in fp32.

S sequences or queries, C padded context, Hq query heads, Hk KV heads, G = Hq / Hk, D head size, N blocks of the cache.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from shoal.attention.base import AttentionBackend, AttentionForm, AttentionMetadata, LayerNeeds
from shoal.attention.cache_dtype import (
    cells,
    clear_blocks,
    decode,
    encode,
    scale_values,
    score_scale,
    write_heads,
)

# The kernel's own split of the keys. A multiple of it would do as well.
KV_SPLIT = 512
# Query rows of a product are padded to a multiple of this: the fewest whose scratch memory, (KV_SPLIT + 2 + D) fp32
# numbers a row, and whose own rows end at a multiple of 64 bytes, D odd or even.
ROW_TILE = {0: 8, 1: 16}


@dataclasses.dataclass(slots=True)
class _Group:
    """Queries whose contexts pad to the same length. blocks: one row of the cache's blocks for each query, or one row
    that all of them share (pieces of a prefill). lengths [S]: keys that each query sees, its own counted in."""

    tokens: torch.Tensor
    blocks: torch.Tensor
    lengths: torch.Tensor
    context: int
    masks: dict[int | None, torch.Tensor]


class DeterministicAttention(AttentionBackend):
    """Cache: [2, Hk, N, block_size, D], keys then values."""

    name = "deterministic"

    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return (2, num_kv_heads, num_blocks, block_size, head_dim)

    def clear_blocks(self, kv_cache: torch.Tensor, blocks: torch.Tensor) -> None:
        clear_blocks(kv_cache, blocks)

    def refusal(self, needs: LayerNeeds) -> str | None:
        if needs.form.softcap is not None:
            return "attention backend deterministic caps no logits: PyTorch's kernel, whose bits it rests on, does not"
        return None

    def prepare(self, metadata: AttentionMetadata) -> None:
        decodes: dict[int, list[tuple[int, int]]] = {}  # padded length -> (row, token)
        groups, first_token = [], 0
        for row, (num_new, seq_len) in enumerate(zip(metadata.query_lens, metadata.seq_lens, strict=True)):
            if num_new == 1:
                decodes.setdefault(_padded(seq_len), []).append((row, first_token))
            else:
                groups += _prefill_groups(metadata, row, first_token)
            first_token += num_new
        for context, members in decodes.items():
            rows = [row for row, _ in members]
            lengths = torch.tensor([metadata.seq_lens[row] for row in rows])
            tokens = torch.tensor([token for _, token in members])
            groups.append(_Group(tokens, _block_rows(metadata, rows, context), lengths, context, {}))
        metadata.plan = groups

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        form: AttentionForm,
    ) -> torch.Tensor:
        write_heads(kv_cache, key, value, metadata.slot_mapping, form)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for group in metadata.plan:
            output[group.tokens] = _attend_group(query[group.tokens], kv_cache, group, form)
        return scale_values(output, form, kv_cache).flatten(1)

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
        rows = cells(kv_cache).flatten(0, 1)  # [N * block_size, L]
        rows.index_copy_(0, metadata.slot_mapping, encode(latent, kv_cache, cache_scale))
        form = AttentionForm(scale, key_scale=cache_scale, value_scale=cache_scale)
        output = torch.empty((*query.shape[:2], value_dim), dtype=query.dtype)
        for group in metadata.plan:
            # As one KV head, whose values are as long as its keys: the kernel knows no others.
            attended = _attend_group(query[group.tokens], kv_cache[None, None], group, form)
            output[group.tokens] = attended[..., :value_dim]
        return scale_values(output, form, kv_cache)


def _padded(length: int) -> int:
    return -(-length // KV_SPLIT) * KV_SPLIT


def _prefill_groups(metadata: AttentionMetadata, row: int, first_token: int) -> list[_Group]:
    """The new tokens of one sequence, cut where their contexts pass a multiple of KV_SPLIT."""
    seq_len = metadata.seq_lens[row]
    groups, start = [], seq_len - metadata.query_lens[row]
    while start < seq_len:
        end = min(seq_len, _padded(start + 1))
        tokens = torch.arange(start, end) + (first_token - seq_len + metadata.query_lens[row])
        context = _padded(end)
        groups.append(_Group(tokens, _block_rows(metadata, [row], context), torch.arange(start, end) + 1, context, {}))
        start = end
    return groups


def _block_rows(metadata: AttentionMetadata, rows: list[int], context: int) -> torch.Tensor:
    """[len(rows), blocks of `context` keys]; block 0 stands in where a table ends before: its keys are masked."""
    num_blocks = -(-context // metadata.block_size)
    tables = metadata.block_tables[rows, :num_blocks]
    return F.pad(tables, (0, num_blocks - tables.shape[1]))


def _mask(group: _Group, window: int | None) -> torch.Tensor:
    """Additive mask [S, 1, 1, C], made once a step for each distinct window."""
    if window not in group.masks:
        position, lengths = torch.arange(group.context)[None, :], group.lengths[:, None]
        hidden = position >= lengths
        if window is not None:
            hidden |= position < lengths - window
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        group.masks[window] = mask[:, None, None, :]
    return group.masks[window]


def _attend_group(query: torch.Tensor, kv_cache: torch.Tensor, group: _Group, form: AttentionForm) -> torch.Tensor:
    """query [S, Hq, D] -> [S, Hq, D]. kv_cache [1, …]: what are keys are values too."""
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads, num_rows = kv_cache.shape[1], group.blocks.shape[0]
    gathered = cells(kv_cache).index_select(2, group.blocks.flatten())
    by_row = gathered.view(gathered.shape[0], num_kv_heads, num_rows, -1, head_dim)
    in_range = decode(by_row[:, :, :, : group.context], kv_cache, torch.float32).float().contiguous()
    mask = _mask(group, form.sliding_window)
    if form.sinks is not None:
        in_range = F.pad(in_range, (0, 0, KV_SPLIT, 0))
        mask = _mask_with_sinks(mask, form.sinks.view(num_kv_heads, -1), head_dim)
    keys, values = in_range[0].transpose(0, 1), in_range[-1].transpose(0, 1)  # [S or 1, Hk, C, D]
    keys, values = keys.expand(num_queries, -1, -1, -1), values.expand(num_queries, -1, -1, -1)
    grouped = query.float().reshape(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    output = _attend(grouped, keys, values, mask, score_scale(form, kv_cache))
    return output.reshape(num_queries, num_heads, head_dim).to(query.dtype)


def _mask_with_sinks(mask: torch.Tensor, sinks: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[S, Hk, G padded, KV_SPLIT + C]: a split of keys before all others, zeros, one of which is seen: its score is the
    mask alone, the head's sink, and its value adds nothing. sinks [Hk, G]."""
    num_kv_heads, group_size = sinks.shape
    padding = -group_size % ROW_TILE[head_dim % 2]
    first = torch.full((num_kv_heads, group_size + padding, KV_SPLIT), float("-inf"))
    first[:, :, 0] = F.pad(sinks.float(), (0, padding))
    shape = (mask.shape[0], num_kv_heads, group_size + padding, -1)
    return torch.cat([first.expand(shape), mask.expand(shape)], dim=-1)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """query [S, Hk, G, D], keys and values [S, Hk, C, D] -> [S, Hk, G, D].

    Three things would make bits depend on the batch or on the number of threads, and may not happen. Products sum
    data in another order when it is aligned differently: the rows are padded to ROW_TILE, so that every operand, the
    scratch memory of each thread too, starts at a multiple of 64 bytes. With one query row the kernel splits the keys
    over threads: the padding sees to that as well. With one (query, head) pair in all it threads the products
    themselves: it gets two.
    """
    num_queries, num_kv_heads, group_size, head_dim = query.shape
    query = F.pad(query, (0, 0, 0, -group_size % ROW_TILE[head_dim % 2]))
    if num_queries * num_kv_heads == 1:
        query, keys, values, mask = (tensor.expand(2, -1, -1, -1) for tensor in (query, keys, values, mask))
    output = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    return output[:num_queries, :, :group_size]
