"""The fast backends against the one that is written out plainly."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shoal.attention.base import AttentionForm, AttentionMetadata
from shoal.attention.registry import create_attention_backend, make_backend
from shoal.attention.torch_paged import _decode_view, _Decodes
from shoal.errors import ConfigError

NUM_BLOCKS = 300


@dataclasses.dataclass
class Step:
    """A random step: contexts that are in the cache already, and new tokens."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    metadata: AttentionMetadata
    old_keys: torch.Tensor
    old_values: torch.Tensor
    old_slots: torch.Tensor


def make_step(
    query_lens: list[int], seq_lens: list[int], heads: tuple[int, int, int], block_size: int, dtype: torch.dtype
) -> Step:
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(sum(seq_lens) + block_size)
    free = (torch.randperm(NUM_BLOCKS - 1, generator=generator) + 1).tolist()
    tables, slots, new_slots = [], [], []
    most = max(-(-length // block_size) for length in seq_lens)
    for num_new, length in zip(query_lens, seq_lens, strict=True):
        blocks = [free.pop() for _ in range(-(-length // block_size))]
        own = [blocks[p // block_size] * block_size + p % block_size for p in range(length)]
        tables.append(blocks + [0] * (most - len(blocks)))
        slots += own[: length - num_new]
        new_slots += own[length - num_new :]

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    metadata = AttentionMetadata(
        query_lens=query_lens,
        seq_lens=seq_lens,
        block_tables=torch.tensor(tables, dtype=torch.int32),
        slot_mapping=torch.tensor(new_slots),
        block_size=block_size,
    )
    num_new, num_old = len(new_slots), len(slots)
    # As the layers have them: key and value are pieces of wider rows.
    merged = randn(num_new, num_heads + 2 * num_kv_heads, head_dim)
    query, key, value = merged.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    old = randn(2, num_old, num_kv_heads, head_dim)
    return Step(query, key, value, metadata, old[0], old[1], torch.tensor(slots, dtype=torch.int64))


def run(name: str, step: Step, window: int | None, scale: float = 0.3) -> torch.Tensor:
    backend = create_attention_backend(name)
    num_kv_heads, head_dim = step.key.shape[1:]
    block_size = step.metadata.block_size
    cache = torch.zeros(backend.kv_cache_shape(NUM_BLOCKS, block_size, num_kv_heads, head_dim), dtype=step.key.dtype)
    if len(step.old_slots):
        # Write the old context through the backend as well: as a prefill of one long sequence.
        count = len(step.old_slots)
        blocks = step.metadata.block_tables[:1, :1].expand(1, -(-count // block_size))
        before = AttentionMetadata([count], [count], blocks, step.old_slots, block_size)
        backend.prepare(before)
        query = step.query[:1].expand(count, -1, -1)
        backend.forward(query, step.old_keys, step.old_values, cache, before, AttentionForm(scale))
    metadata = dataclasses.replace(step.metadata)
    backend.prepare(metadata)
    return backend.forward(step.query, step.key, step.value, cache, metadata, AttentionForm(scale, window))


STEPS = {
    "one decode": ([1], [77]),
    "decodes": ([1] * 7, [1, 2, 16, 17, 33, 250, 64]),
    "whole prefills": ([5, 40, 2], [5, 40, 2]),
    "pieces": ([30, 17], [100, 18]),
    "mixed": ([1, 30, 1, 1, 64, 2], [9, 30, 200, 1, 130, 600]),
    "past a split": ([700], [1100]),
}


@pytest.mark.parametrize("name", ["torch_paged", "deterministic"])
@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("heads", [(4, 4, 16), (14, 2, 64), (6, 1, 15), (1, 1, 8)])
@pytest.mark.parametrize("window", [None, 1, 20, 513, 5000])
def test_equals_the_reference(name: str, case: str, heads: tuple[int, int, int], window: int | None) -> None:
    query_lens, seq_lens = STEPS[case]
    step = make_step(query_lens, seq_lens, heads, 16, torch.float32)
    torch.testing.assert_close(run(name, step, window), run("reference", step, window), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["torch_paged", "deterministic"])
@pytest.mark.parametrize("block_size", [1, 7, 16, 64])
def test_block_sizes_and_bfloat16(name: str, block_size: int) -> None:
    query_lens, seq_lens = [1, 20, 1, 3], [30, 20, 41, 60]
    step = make_step(query_lens, seq_lens, (8, 2, 32), block_size, torch.bfloat16)
    found = run(name, step, 25)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found, run("reference", step, 25), atol=2e-2, rtol=2e-2)


def test_names() -> None:
    with pytest.raises(
        ConfigError,
        match="'flash' is unknown; there are: bidirectional, reference, torch_paged, triton_paged, deterministic",
    ):
        create_attention_backend("flash")
    assert make_backend(False, torch.device("cpu")).name == "torch_paged"
    assert make_backend(True, torch.device("cpu")).name == "deterministic"
    with pytest.raises(ConfigError, match="deterministic mode runs on CPU, not on cuda"):
        make_backend(True, torch.device("cuda"))


@pytest.mark.parametrize("window", [1, 2, 16, 17, 18, 33, 100])
def test_decodes_read_the_blocks_of_their_windows_only(window: int) -> None:
    seq_lens = [1, 15, 16, 17, 99, 100, 101, 300, 512]
    step = make_step([1] * len(seq_lens), seq_lens, (4, 2, 16), 16, torch.float32)
    torch.testing.assert_close(run("torch_paged", step, window), run("reference", step, window), atol=2e-5, rtol=1e-5)
    for length in (100, 257):
        alone = make_step([1], [length], (4, 2, 16), 16, torch.float32)
        expected = run("reference", alone, window)
        torch.testing.assert_close(run("torch_paged", alone, window), expected, atol=2e-5, rtol=1e-5)
        view = _decode_view(_Decodes(None, [length], alone.metadata.block_tables, {}), 16, torch.float32, window)
        assert len(view.blocks) <= window // 16 + 2
