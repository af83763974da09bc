"""The rehearsal takes every kind of row through the sampler, and leaves no trace."""

from __future__ import annotations

import pytest
import torch

import tests.kernels.conftest  # noqa: F401  the interpreter, before Triton's own functions are made
from shoal.sampling.rehearse import NUM_ROWS, rehearse_sampling
from shoal.sampling.sampler import Sampler
from shoal.sampling.state import SamplingState
from shoal.types.sampling_params import SamplingParams

CPU = torch.device("cpu")


@pytest.mark.parametrize(("num_slots", "expected"), [(1, [1, 1, 1]), (10, [1, 1, 3, 3, 8, 8, 1, 2])])
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


def test_every_shape_of_the_choice_kernel_has_its_number_of_rows() -> None:
    pytest.importorskip("triton")
    from shoal.kernels.sampling import _shape

    shapes = [_shape(num_rows) for num_rows in range(1, 5000)]
    first = [1 + index for index, shape in enumerate(shapes) if index == 0 or shape != shapes[index - 1]]
    assert first == list(NUM_ROWS)
