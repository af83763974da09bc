"""Where a step's sequences lie, on the host and in the places that a graph reads."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.attention.sequences import DeviceSequences, plan_tiles

CPU = torch.device("cpu")
MAX_NUM_SEQS = 12


@st.composite
def steps(draw) -> np.ndarray:
    """As of `plan_tiles`: any sequences of a step."""
    num_new = np.array(draw(st.lists(st.one_of(st.just(1), st.integers(1, 90)), min_size=1, max_size=MAX_NUM_SEQS)))
    before = np.array(draw(st.lists(st.integers(0, 500), min_size=len(num_new), max_size=len(num_new))))
    slots = np.array(draw(st.permutations(range(MAX_NUM_SEQS))))[: len(num_new)]
    return np.stack([slots, np.cumsum(num_new) - num_new, num_new, before + num_new])


@settings(max_examples=200, deadline=None)
@given(st.lists(steps(), min_size=1, max_size=3), st.integers(1, 130), st.integers(0, 40))
def test_each_step_fills_the_places_anew(several: list[np.ndarray], tile_tokens: int, padding: int) -> None:
    most = max(int(step[2].sum()) for step in several) + padding
    kept = DeviceSequences(MAX_NUM_SEQS, most, CPU)
    kept.tiles(tile_tokens, most)
    for step in several:
        kept.fill(step)
        single = step[2] == 1
        num_tokens = int(step[2].sum())
        expected = plan_tiles(step[:, ~single], tile_tokens)
        for size in (num_tokens, most):  # of the graph
            tiles = kept.tiles(tile_tokens, size).numpy()
            assert (tiles[: len(expected)] == expected).all() and not tiles[len(expected) :].any()
            decodes = np.stack([each.numpy() for each in kept.decodes(size)])
            count = int(single.sum())
            assert (decodes[:, :count] == step[[0, 3, 1]][:, single]).all() and not decodes[:, count:].any()


@settings(max_examples=200, deadline=None)
@given(steps(), st.integers(1, 130))
def test_tiles_have_every_token_once_with_its_position(step: np.ndarray, tile_tokens: int) -> None:
    found = [
        (row, token + offset, position + offset)
        for row, token, count, position in plan_tiles(step, tile_tokens).tolist()
        for offset in range(count)
    ]
    expected = [
        (row, token + offset, length - num_new + offset)
        for row, token, num_new, length in step.T.tolist()
        for offset in range(num_new)
    ]
    assert sorted(found) == sorted(expected)
