"""Decodes of very different lengths in one step: grouped, they give what the plain backend gives."""

from __future__ import annotations

import torch

from shoal.attention.base import AttentionForm, AttentionMetadata
from shoal.attention.registry import create_attention_backend
from shoal.attention.torch_paged import _group_by_length


def test_groups_hold_every_row_once_and_only_where_padding_is_much() -> None:
    assert _group_by_length([10, 20, 30], [0, 2]) == [[0, 2]]
    assert _group_by_length([3000, 2900, 3100, 2000], [0, 1, 2, 3]) == [[0, 1, 2, 3]]
    groups = _group_by_length([8000, 17, 20, 5000, 9], [0, 1, 2, 4])
    assert sorted(row for group in groups for row in group) == [0, 1, 2, 4]
    assert [0] in groups and [1, 2] in groups
    assert _group_by_length([5], []) == []


def test_grouped_decodes_equal_the_reference() -> None:
    generator = torch.Generator().manual_seed(3)
    block_size, num_heads, num_kv_heads, head_dim = 16, 4, 2, 8
    seq_lens, query_lens = [2500, 3, 40, 700, 18], [1, 1, 1, 2, 1]
    blocks_of = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(blocks_of) + 1
    ids = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    tables = torch.zeros((len(seq_lens), max(blocks_of)), dtype=torch.int32)
    slots = []
    for row, count in enumerate(blocks_of):
        tables[row, :count] = torch.tensor([ids.pop() for _ in range(count)])
        for position in range(seq_lens[row] - query_lens[row], seq_lens[row]):
            slots.append(int(tables[row, position // block_size]) * block_size + position % block_size)
    query, key, value = (
        torch.randn((len(slots), heads, head_dim), generator=generator)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    cells = torch.randn((2, num_kv_heads, num_blocks, block_size, head_dim), generator=generator)
    for window in (None, 100):
        outputs = []
        for name in ("torch_paged", "reference"):
            backend = create_attention_backend(name)
            shape = backend.kv_cache_shape(num_blocks, block_size, num_kv_heads, head_dim)
            # The reference's cache may be laid out otherwise: find the axes by their sizes.
            cache = cells if shape == tuple(cells.shape) else cells.permute(0, 2, 3, 1, 4).contiguous()
            assert cache.shape == shape
            metadata = AttentionMetadata(query_lens, seq_lens, tables, torch.tensor(slots), block_size)
            backend.prepare(metadata)
            outputs.append(backend.forward(query, key, value, cache.clone(), metadata, AttentionForm(0.3, window)))
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
