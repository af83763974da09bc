"""Prefill on a GPU, at every length around the kernels' tiles, against the plain backend."""

from __future__ import annotations

import pytest
import torch

from shoal.attention.base import AttentionForm, AttentionMetadata
from shoal.attention.registry import create_attention_backend

BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 16, 4, 2, 32


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("num_before", [0, 40])
def test_prefill_of_any_length(window: int | None, num_before: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for num_new in [2, 3, 7, 8, 9, *range(60, 70), *range(124, 134), 192, 193, 257, 300]:
        context = num_before + num_new
        num_blocks = -(-context // BLOCK_SIZE) + 1
        tables = torch.arange(1, num_blocks, dtype=torch.int32)[None]
        slots = torch.arange(BLOCK_SIZE + num_before, BLOCK_SIZE + context)
        query, key, value = (
            torch.randn((num_new, heads, HEAD_DIM), generator=generator)
            for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
        )
        cells = torch.randn((2, NUM_KV_HEADS, num_blocks, BLOCK_SIZE, HEAD_DIM), generator=generator)
        outputs = []
        for name, device in (("reference", "cpu"), ("torch_paged", "cuda")):
            backend = create_attention_backend(name)
            shape = backend.kv_cache_shape(num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
            cache = cells if shape == tuple(cells.shape) else cells.permute(0, 2, 3, 1, 4)
            assert cache.shape == shape
            metadata = AttentionMetadata([num_new], [context], tables.to(device), slots.to(device), BLOCK_SIZE)
            backend.prepare(metadata)
            tensors = [tensor.to(device) for tensor in (query, key, value, cache.contiguous().clone())]
            outputs.append(backend.forward(*tensors, metadata, AttentionForm(0.3, window)).cpu())
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4, msg=f"{num_new} after {num_before}")
