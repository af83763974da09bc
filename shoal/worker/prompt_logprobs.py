"""PromptLogprobs: log-probabilities of the tokens of prompts, from the hidden states of a step that computes them.

Owned by the model runner on the last stage. T tokens of a step, H hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from shoal.messages import SlotAssignment, SlotWork
from shoal.models.base import CausalLM
from shoal.sampling.logprobs import prompt_logprobs, to_host
from shoal.types.outputs import TokenLogprobs
from shoal.worker.input_batch import StepInputs

# Rows of logits made at once: 256 x 152,000 fp32 are 150 MB.
_ROWS_AT_ONCE = 256


@dataclasses.dataclass(slots=True)
class _PromptRows:
    """Prompt positions of one row whose next token's log-probability is wanted."""

    row: int
    first_token: int
    targets: list[int]
    num_top: int


class PromptLogprobs:
    """assignments: by slot, of the requests that hold them."""

    def __init__(self, model: CausalLM, device: torch.device) -> None:
        self._model, self._device = model, device

    def wants(self, item: SlotWork, assignments: Sequence[SlotAssignment | None]) -> bool:
        """Whether log-probabilities of prompt tokens come of this piece."""
        assignment = assignments[item.slot]
        if assignment is None or assignment.sampling.prompt_logprobs is None:
            return False
        return item.num_computed_tokens < assignment.num_prompt_tokens - 1

    def results(
        self, inputs: StepInputs, hidden: torch.Tensor, assignments: Sequence[SlotAssignment | None]
    ) -> dict[int, list[TokenLogprobs]]:
        """Of the prompt tokens that follow the positions computed in this step, by slot. hidden [T, H], after the final
        norm; where nobody `wants` any it is not looked at."""
        results = {}
        for rows in _rows_of(inputs, assignments):
            assert hidden.shape[0] == inputs.num_tokens, "the states of all tokens"
            entries: list[TokenLogprobs] = []
            for start in range(0, len(rows.targets), _ROWS_AT_ONCE):
                targets = rows.targets[start : start + _ROWS_AT_ONCE]
                first = rows.first_token + start
                logits = self._model.compute_full_logits(hidden[first : first + len(targets)])
                tensors = prompt_logprobs(logits, torch.tensor(targets, device=self._device), rows.num_top)
                entries += [entry for entry in to_host(tensors) if entry is not None]
            results[int(inputs.slots[rows.row])] = entries
        return results


def _rows_of(inputs: StepInputs, assignments: Sequence[SlotAssignment | None]) -> list[_PromptRows]:
    rows, first_token = [], 0
    for row, slot in enumerate(inputs.slots.tolist()):
        assignment, count = assignments[slot], int(inputs.counts[row])
        assert assignment is not None, "work for a slot that nobody holds"
        num_top = assignment.sampling.prompt_logprobs
        if num_top is not None:
            start = int(inputs.starts[row])
            end = min(start + count, assignment.num_prompt_tokens - 1)
            targets = assignment.token_ids[start + 1 : end + 1] if end > start else []
            if targets:
                rows.append(_PromptRows(row, first_token, targets, num_top))
        first_token += count
    return rows
