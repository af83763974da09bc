"""The rehearsal takes every kind of row through the sampler, and leaves no trace."""

from __future__ import annotations

import pytest
import torch

from shoal.sampling.rehearse import rehearse_sampling
from shoal.sampling.sampler import Sampler
from shoal.sampling.state import SamplingState
from shoal.types.sampling_params import SamplingParams

CPU = torch.device("cpu")


@pytest.mark.parametrize(("num_slots", "expected"), [(1, [1, 1]), (4, [1, 2, 2, 1])])
def test_leaves_the_slots_free(num_slots: int, expected: list[int]) -> None:
    state, sampler, sizes = SamplingState(num_slots, 100, CPU), Sampler(), []

    def make_logits(num_rows: int) -> torch.Tensor:
        sizes.append(num_rows)
        return torch.zeros(num_rows, 100)

    rehearse_sampling(sampler, state, num_slots, make_logits)
    assert sizes == expected
    for slot in range(num_slots):  # none is taken
        state.assign(slot, SamplingParams(temperature=0.0), [1], 1)
    logits = torch.zeros(num_slots, 100)
    logits[:, 7] = 1.0
    sampled = sampler.sample(logits, state.prepare(list(range(num_slots)), [1] * num_slots))
    assert sampled.token_ids.tolist() == [7] * num_slots
