"""A step in two halves: each attends as the whole does, a sequence that is cut goes on in the second."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.attention.base import AttentionForm, AttentionMetadata
from shoal.attention.registry import create_attention_backend

HEADS, DIM, BLOCK = 2, 8, 4


@settings(deadline=None, max_examples=60)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 11)), min_size=1, max_size=5),
    where=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_halves_attend_as_the_whole(sequences: list[tuple[int, int]], where: float, seed: int) -> None:
    """sequences: (new tokens, context before)."""
    query_lens = [count for count, _ in sequences]
    num_tokens = sum(query_lens)
    if num_tokens < 2:
        return
    cut = 1 + round(where * (num_tokens - 2))
    generator = torch.Generator().manual_seed(seed)
    num_blocks = 5
    tables = 1 + torch.randperm(len(sequences) * num_blocks, generator=generator).view(-1, num_blocks)
    slots = torch.cat(
        [
            torch.tensor([int(table[at // BLOCK]) * BLOCK + at % BLOCK for at in range(context, context + count)])
            for table, (count, context) in zip(tables, sequences, strict=True)
        ]
    )
    whole = AttentionMetadata(
        query_lens, [sum(each) for each in sequences], tables.to(torch.int32), slots, block_size=BLOCK
    )
    backend = create_attention_backend("torch_paged")
    shape = backend.kv_cache_shape(1 + tables.numel(), BLOCK, HEADS, DIM)
    cache = torch.randn(shape, generator=generator)
    query, key, value = (torch.randn(num_tokens, HEADS, DIM, generator=generator) for _ in range(3))
    form = AttentionForm(DIM**-0.5)

    def attend(metadata: AttentionMetadata, rows: slice, cache: torch.Tensor) -> torch.Tensor:
        backend.prepare(metadata)
        return backend.forward(query[rows], key[rows], value[rows], cache, metadata, form)

    caches = [cache.clone(), cache.clone()]
    expected = attend(whole, slice(None), caches[0])
    first, second = whole.split(cut)
    assert sum(first.query_lens) == cut and min(first.query_lens + second.query_lens) > 0
    assert len(first.query_lens) == len(first.seq_lens) == len(first.block_tables)
    assert len(second.query_lens) == len(second.seq_lens) == len(second.block_tables)
    parts = [attend(first, slice(cut), caches[1]), attend(second, slice(cut, None), caches[1])]
    torch.testing.assert_close(torch.cat(parts), expected)
    assert torch.equal(*caches)
