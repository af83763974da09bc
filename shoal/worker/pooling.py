"""SequencePooling: from the hidden states of a step's tokens to the vectors and scores of texts that end in it.

Owned by the model runner on the last stage of a model that pools. What a text needs of its earlier chunks is kept here
by slot. T tokens and R rows (requests) of a step, H hidden size, N numbers of a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import torch

from shoal.config.pooling import PoolingConfig
from shoal.messages import BatchResult, SlotAssignment, SlotResult
from shoal.models.pooler import Pooler
from shoal.types.pooling_params import PoolingParams
from shoal.worker.input_batch import StepInputs


def mark_segments(assignment: SlotAssignment, num_segments: int, vocab_size: int) -> SlotAssignment:
    """For encoders that tell segments apart: the ids of the second one are raised by the vocabulary's size."""
    pooling = assignment.pooling
    if num_segments < 2 or pooling is None or pooling.first_segment is None:
        return assignment
    first, ids = pooling.first_segment, assignment.token_ids
    return msgspec.structs.replace(assignment, token_ids=ids[:first] + [id_ + vocab_size for id_ in ids[first:]])


class SequencePooling:
    def __init__(
        self, config: PoolingConfig, pooler: Pooler, max_num_seqs: int, hidden_size: int, device: torch.device
    ) -> None:
        self._config = config
        self._pooler = pooler
        # Of texts whose chunks have begun: the sum of their states, or the first one.
        self._kept: torch.Tensor | None = None
        if config.kind != "last":
            self._kept = torch.zeros((max_num_seqs, hidden_size), dtype=torch.float32, device=device)

    @property
    def needs_last_only(self) -> bool:
        """Whether it looks at no token but a text's last."""
        return self._kept is None

    def take(
        self, inputs: StepInputs, hidden: torch.Tensor, assignments: Sequence[SlotAssignment | None]
    ) -> Callable[[], BatchResult]:
        """hidden, after the final norm: [R, H] of the last tokens if `needs_last_only`, else [T, H]. Returns what waits
        for the device and reads the results. Steps come in their order, each with all of its rows."""
        pooled = self._pool(inputs, hidden)
        slots = inputs.sample_slots.tolist()
        params = []
        for slot in slots:
            assignment = assignments[slot]
            assert assignment is not None and assignment.pooling is not None, "a request for tokens"
            params.append(assignment.pooling)
        if not slots:
            return lambda: BatchResult(inputs.step_id, inputs.generation, [])
        host = self._pooler(pooled.to(hidden.dtype)).to("cpu", non_blocking=True)
        event: torch.cuda.Event | None = None
        if hidden.is_cuda:
            event = torch.cuda.Event()
            event.record()

        def collect() -> BatchResult:
            if event is not None:
                event.synchronize()
            results = [
                SlotResult(slot, [], pooled=self._finish(row, own).numpy().astype("<f4").tobytes())
                for slot, row, own in zip(slots, host, params, strict=True)
            ]
            return BatchResult(inputs.step_id, inputs.generation, results)

        return collect

    def _pool(self, inputs: StepInputs, hidden: torch.Tensor) -> torch.Tensor:
        """[R, H] of the rows whose prompts end in this step; where there are none, anything."""
        if self._kept is None:
            return hidden
        is_mean = self._config.kind == "mean"
        for row, part in enumerate(hidden.split(inputs.query_lens)):
            slot, start = int(inputs.slots[row]), int(inputs.starts[row])
            if is_mean:
                total = part.float().sum(0)
                self._kept[slot] = total if start == 0 else self._kept[slot] + total
            elif start == 0:
                self._kept[slot] = part[0].float()
        rows = inputs.sample_rows
        pooled = self._kept[torch.from_numpy(inputs.slots[rows]).to(hidden.device)]
        if is_mean:
            lengths = torch.from_numpy((inputs.starts + inputs.counts)[rows]).to(hidden.device)
            pooled = pooled / lengths.unsqueeze(1)
        return pooled

    def _finish(self, row: torch.Tensor, params: PoolingParams) -> torch.Tensor:
        """row [N], as the pooler gave it -> what the client asked for."""
        config = self._config
        if config.task == "score":
            if params.use_activation is False or config.activation == "identity":
                return row
            return row.sigmoid() if config.activation == "sigmoid" else row.softmax(0)
        if params.dimensions is not None:
            row = row[: params.dimensions]
        wanted = config.normalize if params.use_activation is None else params.use_activation
        return torch.nn.functional.normalize(row, dim=0) if wanted else row
