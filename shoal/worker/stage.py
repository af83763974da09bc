"""PipelineStage: what one stage of the pipeline takes from the others and gives to them. The model runner calls it.

Hidden states go up from stage to stage, the tokens of the last stage go back to the first. Nothing is said about what
comes: both ends know it from the batch, and take everything in the order of the steps.

Why nobody waits for ever: all ranks get the same steps in the same order. A stage that sends waits for no more than
that the next one takes the hidden states, and a step needs tokens of steps before it alone: those pass all stages
without anything further from the first. So the first stage may wait for the tokens of any earlier step. It does so as
late as it can: when a batch reads one of them, or when more steps than the pipeline holds have sampled since.

On a GPU all this is queued, what is sent on a stream of its own, what is received on the model's: a receive that waits
holds processors of the GPU, and a matrix product that finds one taken takes twice as long.

T tokens of a step, R rows that sample, H hidden size.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from shoal.distributed.communicator import Transfer
from shoal.distributed.rendezvous import ParallelGroups
from shoal.sampling.rows import upload
from shoal.worker.clock import BUSY, HIDDEN, TOKENS, StageClock

# Token ids on their way back: every vocabulary fits.
_TOKEN_TYPE = torch.int32
# (slots [R], token ids [R]), both int64 on the device.
StoreTokens = Callable[[torch.Tensor, torch.Tensor], None]


@dataclasses.dataclass(slots=True)
class _Coming:
    """A step whose tokens the last stage sends back for `slots` int64 [R]."""

    step_id: int
    slots: torch.Tensor


class PipelineStage:
    """One for each rank. With a single stage it does nothing.

    With tensor parallelism all ranks of a stage hold the same hidden states: each sends its part of their columns to
    its peer in the next stage, where the ranks gather, so that each byte crosses the link between stages once.
    """

    def __init__(
        self,
        groups: ParallelGroups,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        max_num_seqs: int,
        clock: StageClock,
    ) -> None:
        dims = groups.dims
        self.is_first, self.is_last = dims.is_first_stage, dims.is_last_stage
        self._group, self._tensor_group = groups.pipeline, groups.tensor
        self._dtype, self._device, self._clock = dtype, device, clock
        # Columns that do not divide are sent whole by every rank.
        self._split = hidden_size % dims.tensor_size == 0 and dims.tensor_size > 1
        self._width = hidden_size // dims.tensor_size if self._split else hidden_size
        self._first_column = dims.tensor_rank * self._width if self._split else 0
        # As many steps as are in flight: one a stage, and one that waits in front.
        self._depth = dims.pipeline_size + 1
        self._transfers: deque[Transfer] = deque()
        self._coming: deque[_Coming] = deque()
        self._sampled_in = np.full(max_num_seqs, -1, np.int64)

    # --- hidden states, upwards ----------------------------------------------------------------------------------

    def receive(self, num_tokens: int) -> torch.Tensor | None:
        """The hidden states [T, H] of this step from the stage before; None on the first stage."""
        if self.is_first:
            return None
        self._clock.enter(HIDDEN)
        part = self._group.recv((num_tokens, self._width), self._dtype, self._group.previous_rank)
        hidden = self._tensor_group.all_gather(part) if self._split else part
        self._clock.enter(BUSY)
        return hidden

    def send(self, hidden: torch.Tensor) -> None:
        """Start to send hidden states [T, H] to the next stage; nothing on the last. They may not be written to again.

        They go while the next step computes. Only what a channel of shared memory cannot hold is waited for, since
        nothing would move it while this rank waits for its next message.
        """
        if self.is_last:
            return
        part = hidden[:, self._first_column : self._first_column + self._width]
        self._keep(self._group.isend(part, self._group.next_rank))

    # --- tokens, back to the first stage -------------------------------------------------------------------------

    def send_tokens(self, token_ids: torch.Tensor) -> None:
        """Last stage: what a step sampled, int64 [R], starts on its way to the first stage."""
        self._keep(self._group.isend(token_ids.to(_TOKEN_TYPE), 0))

    def expect_tokens(self, step_id: int, slots: np.ndarray) -> None:
        """First stage, after `send`: this step samples for `slots` [R], and the last stage will send the tokens."""
        if not len(slots):
            return
        self._sampled_in[slots] = step_id
        self._coming.append(_Coming(step_id, upload(slots, self._device)))

    def fetch_tokens(self, slots: np.ndarray, store: StoreTokens) -> None:
        """First stage: `slots` read their last token in the coming step. Store all tokens up to those, in the order of
        the steps, and those of steps that must have left the pipeline."""
        needed = int(self._sampled_in[slots].max(initial=-1))
        while self._coming and (self._coming[0].step_id <= needed or len(self._coming) >= self._depth):
            self._clock.enter(TOKENS)
            self._take(self._coming.popleft(), store)
            self._clock.enter(BUSY)

    def settle(self, store: StoreTokens) -> None:
        """Between steps, when the last one is done: take what nobody has read yet, let go of what has been sent."""
        while self._coming:
            self._take(self._coming.popleft(), store)
        while self._transfers:
            self._transfers.popleft().wait()

    def _take(self, coming: _Coming, store: StoreTokens) -> None:
        token_ids = self._group.recv(coming.slots.shape, _TOKEN_TYPE, self._group.world_size - 1)
        store(coming.slots, token_ids.to(torch.int64))

    def _keep(self, transfer: Transfer) -> None:
        """Hold a tensor that is being sent. Those of steps that must have left the pipeline have arrived."""
        if not transfer.goes_on_alone:
            self._clock.enter(HIDDEN)
            transfer.wait()
            self._clock.enter(BUSY)
            return
        self._transfers.append(transfer)
        if len(self._transfers) > self._depth:
            self._transfers.popleft().wait()
