"""StageClock: what a rank spends its time on, computing or waiting, so that each stage's bubble can be told. The model
runner calls it a few times a step."""

from __future__ import annotations

import time
from collections import deque

import torch

from shoal.distributed.status import StatusRecord

# What a rank does between two calls: waits for the next message; for tokens from the last stage; for hidden states to
# come from the stage before or to be taken by the next; computes.
MESSAGES, TOKENS, HIDDEN, BUSY = "messages", "tokens", "hidden", "busy"
STATES = (MESSAGES, TOKENS, HIDDEN, BUSY)


class StageClock:
    """Seconds in each state since the first step. On CUDA they are the device's: marks in the stream of the model.

    The status record is told of busy seconds as they are known. A call costs about a microsecond on a CPU.
    """

    def __init__(self, device: torch.device, status: StatusRecord, *, measures: bool = True) -> None:
        """measures: False on a GPU that no other stage waits for: marks cost some microseconds of the host each."""
        self._measures = measures or device.type == "cpu"
        self._seconds = dict.fromkeys(STATES, 0.0)
        self._status = status
        self._num_steps = 0
        self._marks: deque[tuple[str, torch.cuda.Event]] | None = deque() if device.type == "cuda" else None
        self._spare: list[torch.cuda.Event] = []
        self._state, self._since = MESSAGES, 0.0

    def begin_step(self) -> None:
        """Waiting for messages counts from here on; what came before the first step does not."""
        if not self._num_steps:
            self._since = time.monotonic()
        self._num_steps += 1
        self._fold()

    def enter(self, state: str) -> None:
        """From now on, or from this point of the stream on, this rank is in `state`."""
        if not self._measures:
            return
        if self._marks is None:
            now = time.monotonic()
            self._add(self._state, now - self._since)
            self._state, self._since = state, now
            return
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((state, event))

    def seconds(self) -> dict[str, float]:
        """Seconds by state, and "num_steps". Of a GPU: up to the last mark that it has passed."""
        self._fold()
        return {**self._seconds, "num_steps": self._num_steps}

    def _fold(self) -> None:
        """Add up what lies between marks that the GPU has passed."""
        while self._marks is not None and len(self._marks) > 1 and self._marks[1][1].query():
            state, event = self._marks.popleft()
            self._add(state, event.elapsed_time(self._marks[0][1]) / 1000)
            self._spare.append(event)

    def _add(self, state: str, seconds: float) -> None:
        self._seconds[state] += seconds
        if state == BUSY:
            self._status.add_busy(seconds)
