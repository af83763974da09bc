"""The deterministic backend: a query row has the same bits however its context and its neighbours are laid out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
    cache_dtype: torch.dtype = torch.float32,
    sinks: torch.Tensor | None = None,
    value_dim: int | None = None,
) -> torch.Tensor:
    """One sequence, computed in `pieces`; beside it, in every step, another one of `mate` tokens. value_dim: of
    latents, which are the keys then."""
    query, key, value = tensors
    backend = create_attention_backend(name)
    shape = backend.kv_cache_shape(NUM_BLOCKS, block_size, key.shape[1], key.shape[2])
    if value_dim is not None:
        shape = backend.latent_cache_shape(NUM_BLOCKS, block_size, key.shape[2])
    cache = torch.full(shape, 9.0).to(cache_dtype)
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
        if value_dim is None:
            output = backend.forward(*inputs, cache, metadata, AttentionForm(0.25, window, sinks=sinks, key_scale=0.7))
        else:
            latents = inputs[1][:, 0]
            output = backend.forward_latent(inputs[0], latents, cache, metadata, scale=0.25, value_dim=value_dim)
        outputs.append(output[mate:])
        start = end
    return torch.cat(outputs)


HEADS = [(8, 2, 16), (3, 1, 20), (2, 2, 15), (1, 1, 16)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 100, 700])
def test_same_bits_in_any_pieces_and_company(heads: tuple[int, int, int], window: int | None) -> None:
    check(heads, window, PIECES)


@pytest.mark.parametrize("heads", HEADS)
def test_same_bits_with_threads(two_threads: None, heads: tuple[int, int, int]) -> None:
    check(heads, None, [1290, 1, 1, 8])


PIECES = [500, 1, 1, 30, 1, 257, 1, 400, 108, 1]


@pytest.mark.parametrize("heads", HEADS)
def test_same_bits_with_sinks_and_a_cache_of_8_bits(heads: tuple[int, int, int]) -> None:
    sinks = torch.linspace(-1, 6, heads[0])
    check(heads, 300, PIECES, sinks=sinks)
    check(heads, None, PIECES, sinks=sinks, cache_dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float8_e5m2])
def test_same_bits_with_latents(cache_dtype: torch.dtype) -> None:
    check((5, 1, 24), None, PIECES, value_dim=16, cache_dtype=cache_dtype)


def check(heads: tuple[int, int, int], window: int | None, pieces: list[int], **kind: Any) -> None:
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(1)
    query = torch.randn((LENGTH, num_heads, head_dim), generator=generator)
    key, value = torch.randn((2, LENGTH, num_kv_heads, head_dim), generator=generator)
    tensors = (query, key, value)
    whole = attend("deterministic", tensors, [LENGTH], window, **kind)
    assert sum(pieces) == LENGTH
    assert torch.equal(attend("deterministic", tensors, pieces, window, **kind), whole)
    assert torch.equal(attend("deterministic", tensors, pieces, window, mate=1, **kind), whole)
    assert torch.equal(attend("deterministic", tensors, pieces, window, block_size=9, **kind), whole)
    assert torch.equal(attend("deterministic", tensors, pieces, window, mate=900, **kind), whole)
