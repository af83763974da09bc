"""One sampling step of each kind that has kernels of its own, so that no request waits for their compiler.

Called by the model runner at the start, while no slot is taken. R rows, W width of this rank's slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from shoal.sampling.sampler import Sampler
from shoal.sampling.state import SamplingState
from shoal.types.sampling_params import SamplingParams

_GREEDY = SamplingParams(temperature=0.0)
_DRAWN = SamplingParams(seed=1)
_TRUNCATED = SamplingParams(seed=1, top_k=50, top_p=0.9, min_p=0.01)
# Alone, and beside others, where rows are picked out of the step's.
_STEPS = ((_TRUNCATED,), (_TRUNCATED, _GREEDY), (_GREEDY, _DRAWN), (_DRAWN,))


def rehearse_sampling(
    sampler: Sampler, state: SamplingState, num_slots: int, make_logits: Callable[[int], torch.Tensor]
) -> None:
    """make_logits: R -> logits [R, W] as the head projects them. The state is left as it was; tokens are dropped."""
    for params in _STEPS:
        if len(params) > num_slots:
            continue
        slots = list(range(len(params)))
        for slot, each in zip(slots, params, strict=True):
            state.assign(slot, each, [0], 1)
        try:
            metadata = state.prepare(slots, [1] * len(slots))
            sampler.sample(make_logits(len(slots)), metadata)
        finally:
            for slot in slots:
                state.release(slot)
