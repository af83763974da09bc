"""Drawn tokens follow the distribution that temperature, top_k, top_p and min_p define. Seeds are fixed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shoal.sampling.sampler import Sampler
from shoal.sampling.state import SamplingState
from shoal.types import SamplingParams
from tests.sampling import reference
from tests.sampling.helpers import CPU, chi_square

NUM_ROWS = 100
NUM_STEPS = 300


def draw_many(params: SamplingParams, logits: torch.Tensor) -> np.ndarray:
    """NUM_ROWS requests with neighbouring seeds, NUM_STEPS positions each: all their tokens."""
    state = SamplingState(NUM_ROWS, logits.numel(), CPU)
    for slot in range(NUM_ROWS):
        state.assign(slot, params.clone(seed=slot), [1], 1)
    sampler, slots, chosen = Sampler(), list(range(NUM_ROWS)), []
    for step in range(NUM_STEPS):
        metadata = state.prepare(slots, [1 + step] * NUM_ROWS)
        chosen.append(sampler.sample(logits.expand(NUM_ROWS, -1).clone(), metadata).token_ids)
    return torch.cat(chosen).numpy()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.15},
        {"top_k": 9, "top_p": 0.8},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
        {"top_p": 0.9, "min_p": 0.05, "temperature": 0.8},
    ],
)
def test_frequencies_follow_the_probabilities(changes: dict[str, float]) -> None:
    params = SamplingParams(**changes)
    logits = torch.randn(24, generator=torch.Generator().manual_seed(3)) * 1.5
    weights = reference.kept_weights(logits.tolist(), params)
    kept = sorted(weights)
    counts = np.bincount(draw_many(params, logits), minlength=24)
    assert set(np.flatnonzero(counts)) <= set(kept)
    expected = np.array([weights[i] for i in kept]) / sum(weights.values()) * NUM_ROWS * NUM_STEPS
    assert chi_square(counts[kept], expected) < 4.0


def test_unlikely_tokens_are_drawn_as_often_as_they_should() -> None:
    # One token of probability 0.9 and 999 that share the rest: the precision of the noise near its ends shows here.
    logits = torch.zeros(1000)
    logits[123] = np.log(0.9 / 0.1 * 999)
    counts = np.bincount(draw_many(SamplingParams(), logits), minlength=1000)
    expected = np.full(1000, 0.1 / 999)
    expected[123] = 0.9
    assert chi_square(counts, expected * NUM_ROWS * NUM_STEPS) < 4.0
