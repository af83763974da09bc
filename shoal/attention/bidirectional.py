"""Attention of encoders: every token sees its whole text, before it and behind it. Nothing is cached.

A step holds whole texts only. Texts of like length go together, padded to the longest of them.
S sequences of a group, L its longest, T tokens, Hq query heads, Hk KV heads, D head size.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from shoal.attention.base import AttentionBackend, AttentionForm, AttentionMetadata, LayerNeeds

# A group holds no more rows, padding counted in, than this many times its tokens.
_MOST_PADDING = 1.25


@dataclasses.dataclass(frozen=True, slots=True)
class _Group:
    """tokens [S, L]: where each text's tokens lie in the step; padding repeats the first. seen [S, 1, 1, L]: what is no
    padding, None without any."""

    tokens: torch.Tensor
    seen: torch.Tensor | None


class BidirectionalAttention(AttentionBackend):
    name = "bidirectional"
    sees_both_ways = True
    reads_past_end = False

    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return (num_blocks, 0)

    def clear_blocks(self, kv_cache: torch.Tensor, blocks: torch.Tensor) -> None:
        return None

    def refusal(self, needs: LayerNeeds) -> str | None:
        if needs.is_latent or not needs.form.is_plain or needs.form.sliding_window is not None:
            return f"attention backend {self.name} has no windows, soft caps, sinks or latents"
        return None

    def prepare(self, metadata: AttentionMetadata) -> None:
        assert metadata.query_lens == metadata.seq_lens, "an encoder reads whole texts"
        device = metadata.slot_mapping.device
        starts, start = [], 0
        for length in metadata.query_lens:
            starts.append(start)
            start += length
        metadata.plan = [
            _make_group([starts[row] for row in rows], [metadata.query_lens[row] for row in rows], device)
            for rows in group_lengths(metadata.query_lens)
        ]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        form: AttentionForm,
    ) -> torch.Tensor:
        output = torch.empty_like(query)
        for group in metadata.plan:
            attended = F.scaled_dot_product_attention(
                query[group.tokens].transpose(1, 2),  # [S, Hq, L, D]
                key[group.tokens].transpose(1, 2),
                value[group.tokens].transpose(1, 2),
                attn_mask=group.seen,
                scale=form.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            ).transpose(1, 2)
            if group.seen is None:
                output[group.tokens] = attended
            else:
                seen = group.seen[:, 0, 0]
                output[group.tokens[seen]] = attended[seen]
        return output.flatten(1)


def group_lengths(lengths: list[int]) -> list[list[int]]:
    """Indices of `lengths`, in groups whose padding to the longest is bounded."""
    groups: list[list[int]] = []
    num_tokens = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= _MOST_PADDING * (num_tokens + lengths[row]):
            groups[-1].append(row)
            num_tokens += lengths[row]
        else:
            groups.append([row])
            num_tokens = lengths[row]
    return groups


def _make_group(starts: list[int], lengths: list[int], device: torch.device) -> _Group:
    first = torch.tensor(starts).unsqueeze(1)
    offsets = torch.arange(lengths[0]).unsqueeze(0)  # the longest comes first
    seen = offsets < torch.tensor(lengths).unsqueeze(1)
    tokens = (first + offsets * seen).to(device)
    return _Group(tokens, None if bool(seen.all()) else seen[:, None, None, :].to(device))
