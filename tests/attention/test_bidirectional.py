"""Attention of encoders against a plain softmax over each text, in any mixture of lengths."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.attention.base import AttentionForm, AttentionMetadata
from shoal.attention.bidirectional import BidirectionalAttention, group_lengths

HEADS, KV_HEADS, SIZE = 4, 2, 8
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, seed=st.integers(0, 1000))
def test_each_text_sees_all_of_itself_and_nothing_else(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    query = torch.randn((num_tokens, HEADS, SIZE), generator=generator)
    key, value = (torch.randn((num_tokens, KV_HEADS, SIZE), generator=generator) for _ in range(2))
    backend, slots = BidirectionalAttention(), torch.zeros(num_tokens, dtype=torch.int64)
    metadata = AttentionMetadata(lengths, lengths, torch.zeros((len(lengths), 1), dtype=torch.int32), slots, 16)
    backend.prepare(metadata)
    cache = torch.zeros(backend.kv_cache_shape(5, 16, KV_HEADS, SIZE))
    assert cache.numel() == 0
    found = backend.forward(query, key, value, cache, metadata, AttentionForm(0.3))
    wanted = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        k, v = (each.repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (k, v))
        weights = (torch.einsum("qhd,khd->hqk", q, k) * 0.3).softmax(-1)
        wanted.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-5, rtol=1e-5)


@settings(max_examples=200, deadline=None)
@given(lengths=lengths)
def test_padding_is_bounded(lengths: list[int]) -> None:
    groups = group_lengths(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[row] for row in group]
        assert len(sizes) * max(sizes) <= 1.25 * sum(sizes) and sizes[0] == max(sizes)
