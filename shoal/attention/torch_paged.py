"""Paged attention with PyTorch's own kernels, on any device: the default. Decodes of a step go together, padded to the
longest, in groups of like length where padding would cost too much; each prefill chunk goes alone.

S sequences, T tokens, C context (padded), Hq query heads, Hk KV heads, G = Hq / Hk, D head size, N blocks of the cache.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from shoal.attention.base import AttentionBackend, AttentionForm, AttentionMetadata
from shoal.attention.cache_dtype import cells, clear_blocks, decode, encode, scale_values, score_scale, write_heads
from shoal.attention.written_out import attend_written_out

# PyTorch's memory-efficient kernel (2.11, H200) gets the last row wrong when it has a mask and 64 k + 1 query rows.
_CUDA_QUERY_ROWS = 8
# Tokens of context: below, one call with padding is faster than several.
_MUCH_PADDING = 4096


@dataclasses.dataclass(slots=True)
class _Decodes:
    """Sequences with one new token. tokens: their indices among the T tokens (None: they are all of the step)."""

    tokens: torch.Tensor | None
    seq_lens: list[int]
    tables: torch.Tensor  # [S, blocks of the longest]
    views: dict[int | None, _View]  # by window: made once a step


@dataclasses.dataclass(slots=True)
class _View:
    """What decodes read: `context` positions of these blocks [S * blocks of each], less what the additive mask
    [S, 1, 1, C] hides (None: nothing)."""

    blocks: torch.Tensor
    context: int
    mask: torch.Tensor | None


@dataclasses.dataclass(slots=True)
class _Prefill:
    """One sequence with several new tokens: tokens [start, start + num_new) are its last positions of `context`."""

    start: int
    num_new: int
    context: int
    blocks: torch.Tensor  # [blocks of the sequence]
    masks: dict[int | None, torch.Tensor]


@dataclasses.dataclass(slots=True)
class _Plan:
    block_size: int
    decodes: list[_Decodes]
    prefills: list[_Prefill]


class TorchPagedAttention(AttentionBackend):
    """Cache: [2, Hk, N, block_size, D]: head-major, so that one gather fetches keys and values of whole blocks and the
    result is [2, Hk, S, C, D] without a copy. The GQA group is folded into the query length of decodes and into a
    stride-0 head axis of prefills: keys and values are never repeated."""

    name = "torch_paged"

    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return (2, num_kv_heads, num_blocks, block_size, head_dim)

    def clear_blocks(self, kv_cache: torch.Tensor, blocks: torch.Tensor) -> None:
        clear_blocks(kv_cache, blocks)

    def prepare(self, metadata: AttentionMetadata) -> None:
        query_lens, block_size = metadata.query_lens, metadata.block_size
        decode_rows = [row for row, num_new in enumerate(query_lens) if num_new == 1]
        groups = _group_by_length(metadata.seq_lens, decode_rows)
        decodes = [_plan_decodes(metadata, rows) for rows in groups]
        prefills, start = [], 0
        for row, num_new in enumerate(query_lens):
            if num_new > 1:
                context = metadata.seq_lens[row]
                blocks = metadata.block_tables[row, : -(-context // block_size)]
                prefills.append(_Prefill(start, num_new, context, blocks, {}))
            start += num_new
        metadata.plan = _Plan(block_size, decodes, prefills)

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
        return scale_values(_attend(query, kv_cache, metadata.plan, form).flatten(1), form, kv_cache)

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
        # As one KV head whose values are whole rows: with shorter ones PyTorch has no fast kernel.
        attended = _attend(query, kv_cache[None, None], metadata.plan, form)[..., :value_dim]
        return scale_values(attended, form, kv_cache)


def _attend(query: torch.Tensor, kv_cache: torch.Tensor, plan: _Plan, form: AttentionForm) -> torch.Tensor:
    """query [T, Hq, D] -> [T, Hq, D]. kv_cache [1, …]: what are keys are values too."""
    if not plan.prefills and len(plan.decodes) == 1:
        return _attend_decodes(query, kv_cache, plan.decodes[0], form)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for prefill in plan.prefills:
        tokens = slice(prefill.start, prefill.start + prefill.num_new)
        output[tokens] = _attend_prefill(query[tokens], kv_cache, prefill, form)
    for decodes in plan.decodes:
        single = decodes.tokens
        output[single] = _attend_decodes(query[single], kv_cache, decodes, form)
    return output


def _group_by_length(seq_lens: list[int], rows: list[int]) -> list[list[int]]:
    """Rows that are gathered together. One group, unless padding to the longest would more than double what is read
    and that is much; then one group for each power of two of the length."""
    if not rows:
        return []
    num_padded = len(rows) * max(seq_lens[row] for row in rows)
    if num_padded < _MUCH_PADDING or num_padded <= 2 * sum(seq_lens[row] for row in rows):
        return [rows]
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(seq_lens[row].bit_length(), []).append(row)
    return list(groups.values())


def _plan_decodes(metadata: AttentionMetadata, rows: list[int]) -> _Decodes:
    device = metadata.slot_mapping.device
    seq_lens = [metadata.seq_lens[row] for row in rows]
    num_blocks = -(-max(seq_lens) // metadata.block_size)
    tables = metadata.block_tables[:, :num_blocks]
    tokens = None
    if len(rows) < len(metadata.query_lens):
        first_tokens = [0]
        for num_new in metadata.query_lens:
            first_tokens.append(first_tokens[-1] + num_new)
        tokens = _upload([first_tokens[row] for row in rows], device)
        tables = tables[_upload(rows, device)]
    return _Decodes(tokens, seq_lens, tables, {})


def _upload(numbers: list[int], device: torch.device) -> torch.Tensor:
    """int64, without waiting for the device: from pageable memory a copy would wait for all steps that are queued."""
    return torch.tensor(numbers, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _decode_view(decodes: _Decodes, block_size: int, dtype: torch.dtype, window: int | None) -> _View:
    """With a window, only the blocks that it touches are read: they begin elsewhere in each sequence."""
    tables, device = decodes.tables, decodes.tables.device
    longest = max(decodes.seq_lens)
    if len(decodes.seq_lens) == 1 and (window is None or window >= longest):
        return _View(tables.flatten(), longest, None)
    lengths = _upload(decodes.seq_lens, device)[:, None]
    position = torch.arange(tables.shape[1] * block_size, device=device)[None, :]
    if window is not None and (num_blocks := (window - 2) // block_size + 2) < tables.shape[1]:
        first_block = (lengths - window).clamp_(min=0) // block_size
        column = first_block + torch.arange(num_blocks, device=device)
        tables = tables.gather(1, column.clamp_(max=tables.shape[1] - 1))
        position = first_block * block_size + position[:, : num_blocks * block_size]
    hidden = position >= lengths
    if window is not None:
        hidden |= position < lengths - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    mask.masked_fill_(hidden, torch.finfo(dtype).min)
    return _View(tables.flatten(), hidden.shape[1], mask[:, None, None, :])


def _attend_decodes(
    query: torch.Tensor, kv_cache: torch.Tensor, decodes: _Decodes, form: AttentionForm
) -> torch.Tensor:
    """query [S, Hq, D], one row a sequence; returns [S, Hq, D]."""
    num_sequences, num_heads, head_dim = query.shape
    num_kv_heads, window = kv_cache.shape[1], form.sliding_window
    if window not in decodes.views:
        decodes.views[window] = _decode_view(decodes, kv_cache.shape[3], query.dtype, window)
    view = decodes.views[window]
    gathered = cells(kv_cache).index_select(2, view.blocks)
    by_sequence = gathered.view(gathered.shape[0], num_kv_heads, num_sequences, -1, head_dim)
    in_range = decode(by_sequence[:, :, :, : view.context], kv_cache, query.dtype)
    keys, values = in_range[0].transpose(0, 1), in_range[-1].transpose(0, 1)  # [S, Hk, C, D]
    grouped = query.reshape(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scale = score_scale(form, kv_cache)
    if form.is_plain:
        output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=view.mask, scale=scale)
    else:
        sinks = None if form.sinks is None else form.sinks.float().view(num_kv_heads, -1, 1)
        output = attend_written_out(grouped, keys, values, view.mask, sinks, scale=scale, softcap=form.softcap)
    return output.reshape(num_sequences, num_heads, head_dim)


def _attend_prefill(
    query: torch.Tensor, kv_cache: torch.Tensor, prefill: _Prefill, form: AttentionForm
) -> torch.Tensor:
    """query [Q, Hq, D], one sequence; returns [Q, Hq, D]."""
    num_new, num_heads, head_dim = query.shape
    num_kv_heads, block_size, window = kv_cache.shape[1], kv_cache.shape[3], form.sliding_window
    group = num_heads // num_kv_heads
    blocks, context = prefill.blocks, prefill.context
    if window is not None:  # blocks that slid out of every query's window are not read
        first_block = max(0, context - num_new - window + 1) // block_size
        blocks, context = blocks[first_block:], context - first_block * block_size
    gathered = cells(kv_cache).index_select(2, blocks).flatten(2, 3)[:, :, None, :context]  # [2 or 1, Hk, 1, C, D]
    in_range = decode(gathered, kv_cache, query.dtype)
    grouped = query.view(num_new, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)  # [Hk, G, Q, D]
    causal = num_new == context and (window is None or window >= context)
    scale = score_scale(form, kv_cache)
    if form.is_plain:
        keys, values = in_range[0].expand(-1, group, -1, -1), in_range[-1].expand(-1, group, -1, -1)
        mask = None if causal else _prefill_mask(prefill, context, query, window)
        if mask is not None and num_new < mask.shape[0]:
            grouped = F.pad(grouped, (0, 0, 0, mask.shape[0] - num_new))
        output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, is_causal=causal, scale=scale)
        output = output[:, :, :num_new]
    else:
        mask = _prefill_mask(prefill, context, query, window)[:num_new]
        sinks = None if form.sinks is None else form.sinks.float().view(num_kv_heads, group, 1, 1)
        output = attend_written_out(grouped, in_range[0], in_range[-1], mask, sinks, scale=scale, softcap=form.softcap)
    return output.permute(2, 0, 1, 3).reshape(num_new, num_heads, head_dim)


def _prefill_mask(prefill: _Prefill, context: int, query: torch.Tensor, window: int | None) -> torch.Tensor:
    """Additive mask [Q, C], made once a step for each distinct window. On CUDA Q is padded, by rows that see all."""
    if window not in prefill.masks:
        key = torch.arange(context, device=query.device)[None, :]
        position = torch.arange(context - prefill.num_new, context, device=query.device)[:, None]
        hidden = key > position
        if window is not None:
            hidden |= key <= position - window
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
        mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)
        padding = -prefill.num_new % _CUDA_QUERY_ROWS if query.is_cuda else 0
        prefill.masks[window] = F.pad(mask, (0, 0, 0, padding))
    return prefill.masks[window]
