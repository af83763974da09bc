"""One sampling step of each kind that has kernels of its own, so that no request waits for their compiler.

Called by the model runner at the start, while no slot is taken. R rows, W width of this rank's slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from shoal.sampling.sampler import Sampler
from shoal.sampling.state import SamplingState
from shoal.types.sampling_params import SamplingParams

# The least number of rows of each shape that the choice kernel (`kernels/sampling.py`) has programs of.
NUM_ROWS = (1, 3, 8, 32, 128)
_GREEDY = SamplingParams(temperature=0.0)
# min_p: ranks that share a vocabulary tell each other their best logits.
_DRAWN = SamplingParams(seed=1, min_p=0.01)
# What else reads or changes logits has the kernel read them widened to fp32, in place of the model's type.
_WITH_LOGPROBS = SamplingParams(seed=1, logprobs=1)
_TRUNCATED = SamplingParams(seed=1, top_k=50, top_p=0.9, min_p=0.01)


def _steps(num_slots: int) -> Iterator[tuple[SamplingParams, ...]]:
    for num_rows in NUM_ROWS:
        if num_rows <= num_slots:
            yield (_DRAWN,) * num_rows
            yield (_WITH_LOGPROBS,) + (_DRAWN,) * (num_rows - 1)
    # Alone, and beside others, where rows are picked out of the step's.
    yield (_TRUNCATED,)
    if num_slots > 1:
        yield (_TRUNCATED, _GREEDY)


def rehearse_sampling(
    sampler: Sampler, state: SamplingState, num_slots: int, make_logits: Callable[[int], torch.Tensor]
) -> None:
    """make_logits: R -> logits [R, W] as the head projects them. The state is left as it was; tokens are dropped."""
    for params in _steps(num_slots):
        slots = list(range(len(params)))
        for slot, each in zip(slots, params, strict=True):
            state.assign(slot, each, [0], 1)
        try:
            metadata = state.prepare(slots, [1] * len(slots))
            sampler.sample(make_logits(len(slots)), metadata)
        finally:
            for slot in slots:
                state.release(slot)
