"""What the attention kernels promise beyond the backend's tests: ways that a backend takes on some GPUs only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from shoal.attention.sequences import plan_tiles
from shoal.kernels import decode_attention as decode_attention_module
from shoal.kernels.decode_attention import DecodeRows, DecodeWorkspace, decode_attention
from shoal.kernels.heads import transform_and_write

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 6, 2, 32, 16
SEQ_LENS = [1, 2, 300, 65, 129, 700]


def attend(early: bool, num_processors: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor, DecodeWorkspace]:
    """Output and cache of a step whose tokens' rows lie in another order than the sequences."""
    generator = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    count = len(SEQ_LENS)
    tables = (torch.randperm(count * 44, generator=generator) + 1).view(count, 44).to(DEVICE, torch.int32)
    cache = randn(2, NUM_KV_HEADS, count * 44 + 1, BLOCK_SIZE, HEAD_DIM)
    heads = randn(count, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM)
    query, key, value = heads.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    order = torch.randperm(count, generator=generator).to(DEVICE, torch.int32)
    rows = DecodeRows(tables, order, torch.tensor(SEQ_LENS, dtype=torch.int32, device=DEVICE), order.flip(0))
    workspace = DecodeWorkspace(DEVICE)
    workspace.num_processors = num_processors
    workspace.counters = torch.zeros(16 * num_processors, dtype=torch.int32, device=DEVICE)
    output = torch.full((count, NUM_HEADS * HEAD_DIM), float("nan"), device=DEVICE)
    for _ in range(2):  # the second launch finds the counters as the first did
        decode_attention(
            query, key, value, cache, output, rows, workspace, scale=0.2, sliding_window=window, early=early
        )
    return output.cpu(), cache.cpu(), workspace


@pytest.mark.parametrize("window", [None, 1, 200])
@pytest.mark.parametrize(
    ("early", "num_processors"), [(False, 60), (True, 60), (True, 12)], ids=["splits", "early", "few splits"]
)
def test_all_ways_to_split_agree(
    monkeypatch: pytest.MonkeyPatch, early: bool, num_processors: int, window: int | None
) -> None:
    expected, expected_cache, _ = attend(False, 1, window)  # one split
    assert expected.isfinite().all()
    splits = [(share, few, 64) for share, few, _ in decode_attention_module._SPLITS]
    monkeypatch.setattr(decode_attention_module, "_SPLITS", splits)
    monkeypatch.setattr(decode_attention_module, "_WHOLE_ALONE", 64)
    monkeypatch.setattr("shoal.kernels.decode_attention._LONG_SPLIT", 256)
    output, cache, workspace = attend(early, num_processors, window)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache, expected_cache, atol=0, rtol=0)
    assert (workspace.counters == 0).all()


@pytest.mark.parametrize(
    ("num_groups", "most", "parts", "expected"),
    [
        (8, 3, 16, (3, 3, 128)), (8, 999, 16, (33, 16, 128)), (8, 999, 8, (33, 8, 256)), (40, 999, 16, (8, 8, 256)),
        (128, 999, 16, (8, 4, 512)), (256, 999, 16, (8, 1, 512)), (512, 999, 16, (4, 1, 512)),
        (2048, 999, 16, (1, 1, 512)),
    ],
)  # fmt: skip
def test_number_of_splits(num_groups: int, most: int, parts: int, expected: tuple[int, int, int]) -> None:
    workspace = DecodeWorkspace(DEVICE)
    workspace.num_processors = 132
    assert workspace.num_splits(num_groups, most, parts) == expected


def test_tiles_cover_each_new_token_once() -> None:
    table_rows, num_new, seq_lens = np.array([3, 1, 0]), np.array([5, 32, 70]), np.array([100, 32, 71])
    first_tokens = np.array([7, 20, 60])
    tiles = plan_tiles(np.stack([table_rows, first_tokens, num_new, seq_lens]), 32)
    positions = {row: set(range(length - new, length)) for row, length, new in zip(
        table_rows.tolist(), seq_lens.tolist(), num_new.tolist(), strict=True)}  # fmt: skip
    starts = dict(zip(table_rows.tolist(), (first_tokens - seq_lens + num_new).tolist(), strict=True))
    for row, token, count, position in tiles.tolist():
        assert 0 < count <= 32
        assert token - position == starts[row]
        for p in range(position, position + count):
            positions[row].remove(p)
    assert not any(positions.values())
    assert tiles[0, 3] == max(tiles[:, 3]), "the longest work comes first"


def test_values_pass_through_and_keys_can_be_kept() -> None:
    generator = torch.Generator().manual_seed(2)
    heads = torch.randn((11, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM), generator=generator).to(DEVICE)
    query, key, value = heads.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    cache = torch.zeros((2, NUM_KV_HEADS, 4, BLOCK_SIZE, HEAD_DIM), device=DEVICE)
    slots = torch.randperm(4 * BLOCK_SIZE, generator=generator)[:11].to(DEVICE)
    angles = torch.rand((20, HEAD_DIM // 2), generator=generator).to(DEVICE)
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions = torch.arange(11, device=DEVICE)
    new_query, new_key = transform_and_write(
        query, key, value, cache, slots, positions=positions, table=table, keep_keys=True
    )
    cells = cache.flatten(2, 3)[:, :, slots].transpose(1, 2)
    torch.testing.assert_close(cells[0], new_key, atol=0, rtol=0)
    torch.testing.assert_close(cells[1], value, atol=0, rtol=0)
    assert cache.flatten(2, 3).abs().sum(-1).count_nonzero() == 2 * NUM_KV_HEADS * 11
    for old, new in ((query, new_query), (key, new_key)):
        a, b = old.chunk(2, dim=-1)
        cos, sin = table[positions][:, None].chunk(2, dim=-1)
        torch.testing.assert_close(new, torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1))
