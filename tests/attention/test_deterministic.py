"""The deterministic backend: a query row has the same bits however its context and its neighbours are laid out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from shoal.attention.base import AttentionForm, AttentionMetadata
from shoal.attention.registry import create_attention_backend

NUM_BLOCKS, LENGTH = 400, 1300


@pytest.fixture
def two_threads() -> Iterator[None]:
    """The kernel's threads have scratch memory of their own, and split their work differently from one alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def attend(
    name: str,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    pieces: list[int],
    window: int | None,
    mate: int = 0,
    block_size: int = 16,
) -> torch.Tensor:
    """One sequence, computed in `pieces`; beside it, in every step, another one of `mate` tokens."""
    query, key, value = tensors
    backend = create_attention_backend(name)
    cache = torch.full(backend.kv_cache_shape(NUM_BLOCKS, block_size, key.shape[1], key.shape[2]), 9.0)
    blocks = torch.randperm(200, dtype=torch.int32) + 1
    mate_blocks = torch.arange(201, 201 + len(blocks), dtype=torch.int32)
    outputs, start = [], 0
    for count in pieces:
        end = start + count
        tables = blocks[None, : -(-max(end, mate) // block_size)]
        positions = torch.arange(start, end)
        slots = blocks.long()[positions // block_size] * block_size + positions % block_size
        inputs = [tensor[start:end] for tensor in tensors]
        query_lens, seq_lens = [count], [end]
        if mate:
            query_lens, seq_lens = [mate, count], [mate, end]
            tables = torch.cat([mate_blocks[None, : tables.shape[1]], tables])
            own = torch.arange(mate)
            slots = torch.cat([mate_blocks.long()[own // block_size] * block_size + own % block_size, slots])
            inputs = [torch.cat([torch.randn(mate, *t.shape[1:]), t]) for t in inputs]
        metadata = AttentionMetadata(query_lens, seq_lens, tables, slots, block_size)
        backend.prepare(metadata)
        output = backend.forward(*inputs, cache, metadata, AttentionForm(0.25, window))
        outputs.append(output[mate:])
        start = end
    return torch.cat(outputs)


HEADS = [(8, 2, 16), (3, 1, 20), (2, 2, 15), (1, 1, 16)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 100, 700])
def test_same_bits_in_any_pieces_and_company(heads: tuple[int, int, int], window: int | None) -> None:
    check(heads, window, [500, 1, 1, 30, 1, 257, 1, 400, 108, 1])


@pytest.mark.parametrize("heads", HEADS)
def test_same_bits_with_threads(two_threads: None, heads: tuple[int, int, int]) -> None:
    check(heads, None, [1290, 1, 1, 8])


def check(heads: tuple[int, int, int], window: int | None, pieces: list[int]) -> None:
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(1)
    query = torch.randn((LENGTH, num_heads, head_dim), generator=generator)
    key, value = torch.randn((2, LENGTH, num_kv_heads, head_dim), generator=generator)
    tensors = (query, key, value)
    whole = attend("deterministic", tensors, [LENGTH], window)
    assert sum(pieces) == LENGTH
    assert torch.equal(attend("deterministic", tensors, pieces, window), whole)
    assert torch.equal(attend("deterministic", tensors, pieces, window, mate=1), whole)
    assert torch.equal(attend("deterministic", tensors, pieces, window, block_size=9), whole)
    assert torch.equal(attend("deterministic", tensors, pieces, window, mate=900), whole)
