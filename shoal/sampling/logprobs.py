"""Log-probabilities of the raw logits: of a chosen token, of the top k, and the rank. Called by sampler and runner.

Shapes: R rows of a step, L rows that want log-probabilities, P prompt positions, V vocabulary, k the largest wanted.
Raw means log_softmax of the logits as the model gave them, before masks, penalties and temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.sampling.ordering import best_candidates, distances_to_best, ordering_keys
from shoal.sampling.rows import num_rows_at_once
from shoal.types.outputs import TokenLogprobs

WHOLE_VOCABULARY = -1


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """The rows of a step that want log-probabilities. `rows` as in shoal.sampling.rows; row_numbers is the same on the
    host; num_logprobs: each row's own k (-1: the whole vocabulary)."""

    num_rows: int
    rows: Tensor | None
    row_numbers: list[int]
    num_logprobs: list[int]


@dataclass(frozen=True, slots=True)
class LogprobsTensors:
    """Log-probabilities on a device: of the chosen token in column 0, then the top ones, highest first.

    token_ids int64 [L, 1 + k], logprobs fp32 [L, 1 + k], ranks int64 [L] (1-based, of the chosen token; of equal values
    the lower id ranks first). Line i belongs to row `row_numbers[i]` of the step, of `num_rows`, and wants
    `num_logprobs[i]` top ones.
    """

    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor
    num_rows: int
    row_numbers: list[int]
    num_logprobs: list[int]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LogprobsTensors:
        """A copy on another device; with non_blocking the caller waits for the stream before reading it."""
        return LogprobsTensors(
            self.token_ids.to(device, non_blocking=non_blocking),
            self.logprobs.to(device, non_blocking=non_blocking),
            self.ranks.to(device, non_blocking=non_blocking),
            self.num_rows,
            self.row_numbers,
            self.num_logprobs,
        )


def chosen_and_top(logits: Tensor, token_ids: Tensor, num_logprobs: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """token_ids [L, 1 + k], logprobs [L, 1 + k] and ranks [L] of the chosen token_ids [L] under logits fp32 [L, V].

    The order is that of the logits, not of the log-probabilities: two of those may be equal after rounding.
    """
    vocab_size = logits.shape[1]
    num_top = max((vocab_size if k == WHOLE_VOCABULARY else min(k, vocab_size) for k in num_logprobs), default=0)
    num_at_once = num_rows_at_once(logits)
    parts = [
        _chosen_and_top(part, chosen, num_top)
        for part, chosen in zip(logits.split(num_at_once), token_ids.split(num_at_once), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    ids, logprobs, ranks = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return ids, logprobs, ranks


def _chosen_and_top(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    chosen_ids = token_ids.unsqueeze(1)
    keys = ordering_keys(distances_to_best(logits))
    ranks = (keys < keys.gather(1, chosen_ids)).sum(dim=-1) + 1
    ids = chosen_ids
    if num_top > 0:
        top_ids, _ = best_candidates(keys, num_top)
        ids = torch.cat([chosen_ids, top_ids], dim=1)
    # log_softmax sums each row on its own, in a fixed order; logsumexp may split a lone row among threads.
    return ids, logits.log_softmax(dim=-1).gather(1, ids), ranks


def sampled_logprobs(raw_logits: Tensor, token_ids: Tensor, group: LogprobRows) -> LogprobsTensors:
    """raw_logits fp32 [L, V] of the group's rows; token_ids int64 [L]: what these rows sampled."""
    tensors = chosen_and_top(raw_logits, token_ids, group.num_logprobs)
    return LogprobsTensors(*tensors, group.num_rows, group.row_numbers, group.num_logprobs)


def prompt_logprobs(logits: Tensor, target_ids: Tensor, num_logprobs: int) -> LogprobsTensors:
    """Log-probabilities of a prompt: logits fp32 [P, V] at each position, target_ids int64 [P] that follow them.

    num_logprobs: top ones a position, -1 for the whole vocabulary. The logits are left as they are.
    """
    num_positions = logits.shape[0]
    tensors = chosen_and_top(logits, target_ids, [num_logprobs])
    return LogprobsTensors(*tensors, num_positions, list(range(num_positions)), [num_logprobs] * num_positions)


def to_host(tensors: LogprobsTensors) -> list[TokenLogprobs | None]:
    """One entry for each row of the step, cut to the row's own k; None for rows that did not ask. Waits for a GPU."""
    results: list[TokenLogprobs | None] = [None] * tensors.num_rows
    lines = zip(
        tensors.row_numbers,
        tensors.num_logprobs,
        tensors.token_ids.tolist(),
        tensors.logprobs.tolist(),
        tensors.ranks.tolist(),
        strict=True,
    )
    for row, num_logprobs, token_ids, logprobs, rank in lines:
        end = None if num_logprobs == WHOLE_VOCABULARY else 1 + num_logprobs
        results[row] = TokenLogprobs(token_ids=token_ids[:end], logprobs=logprobs[:end], rank=rank)
    return results
