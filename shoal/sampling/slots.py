"""The sampling parameters of each slot as arrays on the host, so that a new list of slots is gathered in microseconds.

Owned by SamplingState, read by `build_plan`. A field is an array [max_num_seqs], or a list for what few requests have.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.distributed.vocabulary import VocabularySlice
from shoal.sampling.draws import DrawKind
from shoal.sampling.masks import banned_row
from shoal.types.sampling_params import SamplingParams
from shoal.types.seeds import mix64, reduce_seed

# Values of `kind` beside those of DrawKind, which start at 1.
FREE = -1
GREEDY = 0
# Above every possible mass: a row without top_p, in a group with others, is not cut at all.
TOP_P_OFF = 2.0
NO_LOGPROBS = -2
# Divisors and factors beyond this (and below its inverse) would leave the range of float32 with the logits.
_LARGEST = 1e30
NO_PENALTIES = -1


class SlotTable:
    """One line a slot. Lines of free slots hold whatever the last request left, except `kind`."""

    def __init__(self, max_num_seqs: int, vocabulary: VocabularySlice, device: torch.device) -> None:
        self.vocabulary = vocabulary
        self.device = device
        self.kind: npt.NDArray[np.int64] = np.full(max_num_seqs, FREE, dtype=np.int64)
        self.mixed_seed: npt.NDArray[np.uint64] = np.zeros(max_num_seqs, dtype=np.uint64)
        self.temperature, self.min_p, self.repetition, self.presence, self.frequency = (
            np.zeros(max_num_seqs, dtype=np.float32) for _ in range(5)
        )
        self.top_p: npt.NDArray[np.float64] = np.zeros(max_num_seqs, dtype=np.float64)
        self.top_k, self.num_logprobs, self.penalty_row, self.first_free_position = (
            np.zeros(max_num_seqs, dtype=np.int64) for _ in range(4)
        )
        # Positions below first_free_position may not hold one of end_token_ids.
        self.has_minimum, self.has_allowed, self.has_bad, self.has_bias = (
            np.zeros(max_num_seqs, dtype=np.bool_) for _ in range(4)
        )
        # See `device_rows`: simple, but for has_minimum.
        self.is_simple: npt.NDArray[np.bool_] = np.zeros(max_num_seqs, dtype=np.bool_)
        self.end_token_ids: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self.bad_token_ids: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self.logit_bias: list[dict[int, float]] = [{} for _ in range(max_num_seqs)]
        # bool [W], True for what allowed_token_ids leaves out.
        self.banned: list[Tensor | None] = [None] * max_num_seqs

    def fill(self, slot: int, params: SamplingParams, num_prompt_tokens: int, penalty_row: int) -> None:
        """Write the line of a slot. penalty_row: its row of PenaltyCounts, or NO_PENALTIES."""
        greedy = params.greedy or params.top_k == 1
        assert greedy or params.seed is not None, "whoever accepts a request draws its seed"
        top_k = params.top_k if 0 < params.top_k < self.vocabulary.vocab_size else 0
        self.kind[slot] = GREEDY if greedy else _draw_kind(top_k, params.top_p).value
        self.mixed_seed[slot] = mix64(reduce_seed(params.seed or 0))
        self.temperature[slot] = min(params.temperature, _LARGEST)
        self.min_p[slot] = params.min_p
        self.top_p[slot] = params.top_p if params.top_p < 1 else TOP_P_OFF
        self.top_k[slot] = top_k
        self.repetition[slot] = min(max(params.repetition_penalty, 1 / _LARGEST), _LARGEST)
        self.presence[slot] = params.presence_penalty
        self.frequency[slot] = params.frequency_penalty
        self.penalty_row[slot] = penalty_row
        self.num_logprobs[slot] = NO_LOGPROBS if params.logprobs is None else params.logprobs
        self.end_token_ids[slot] = [*params.eos_token_ids, *(params.stop_token_ids or ())]
        self.has_minimum[slot] = params.min_tokens > 0 and bool(self.end_token_ids[slot])
        self.first_free_position[slot] = num_prompt_tokens + params.min_tokens
        self.bad_token_ids[slot] = params.bad_words_token_ids or []
        self.has_bad[slot] = bool(self.bad_token_ids[slot])
        self.logit_bias[slot] = params.logit_bias or {}
        self.has_bias[slot] = bool(self.logit_bias[slot])
        allowed = params.allowed_token_ids
        self.banned[slot] = None if allowed is None else banned_row(allowed, self.vocabulary, self.device)
        self.has_allowed[slot] = allowed is not None
        self.is_simple[slot] = (
            self.kind[slot] in (GREEDY, DrawKind.WHOLE_VOCABULARY.value)
            # What min_p cuts off depends on the best logit of all ranks.
            and (self.vocabulary.is_whole or params.min_p == 0 or greedy)
            and penalty_row == NO_PENALTIES
            and params.logprobs is None
            and not (self.has_bad[slot] or self.has_bias[slot] or self.has_allowed[slot])
        )

    def clear(self, slot: int) -> None:
        self.kind[slot] = FREE
        self.is_simple[slot] = False
        self.banned[slot] = None


def _draw_kind(top_k: int, top_p: float) -> DrawKind:
    if top_k > 0:
        return DrawKind.TOP_K
    return DrawKind.TOP_P if top_p < 1 else DrawKind.WHOLE_VOCABULARY
