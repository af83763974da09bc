"""Shared by the sampling tests: run whole batches through SamplingState and Sampler on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from shoal.sampling.sampler import SampledTokens, Sampler
from shoal.sampling.state import SamplingState
from shoal.types import SamplingParams

CPU = torch.device("cpu")


@dataclass
class Row:
    """One request of a batch: parameters, and the ids before the token to be sampled."""

    params: SamplingParams
    token_ids: list[int] = field(default_factory=lambda: [1])
    num_prompt_tokens: int = 1

    @property
    def position(self) -> int:
        return len(self.token_ids)


def new_state(rows: list[Row], vocab_size: int) -> SamplingState:
    """A state with rows[i] in slot i."""
    state = SamplingState(max(1, len(rows)), vocab_size, CPU)
    for slot, row in enumerate(rows):
        state.assign(slot, row.params, row.token_ids, row.num_prompt_tokens)
    return state


def sample_rows(
    rows: list[Row], logits: np.ndarray | torch.Tensor, grammar_mask: torch.Tensor | None = None
) -> SampledTokens:
    """One step over all rows, in a state of their own. The logits are left as they are."""
    scratch = torch.as_tensor(logits, dtype=torch.float32).clone()
    state = new_state(rows, scratch.shape[1])
    metadata = state.prepare(list(range(len(rows))), [row.position for row in rows])
    return Sampler().sample(scratch, metadata, grammar_mask)


def sample_ids(
    rows: list[Row], logits: np.ndarray | torch.Tensor, grammar_mask: torch.Tensor | None = None
) -> list[int]:
    return sample_rows(rows, logits, grammar_mask).token_ids.tolist()


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations Pearson's statistic lies above its mean (Wilson-Hilferty): about normal."""
    statistic = float(((observed - expected) ** 2 / expected).sum())
    degrees = observed.size - 1
    scale = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - scale)) / scale**0.5
