"""Pulse: when a core was heard of last, and when it got on last. Kept for each core by AsyncEngine or ReplicatedClient.

A core that has work says something several times a second, be it that its ranks show no sign; what says nothing is
stopped, or stuck. Times are seconds of time.monotonic().
"""

from __future__ import annotations

import time

from shoal.messages import CoreOutputs


class Pulse:
    """What is asked counts while the core has work: say so with `begin` when it gets some and had none."""

    def __init__(self) -> None:
        self._heard = self._got_on = time.monotonic()
        self._num_steps = 0

    def begin(self) -> None:
        self._heard = self._got_on = time.monotonic()

    def take(self, outputs: CoreOutputs) -> None:
        now = self._heard = time.monotonic()
        stats = outputs.stats
        if outputs.deltas or (stats is not None and stats.num_steps_total != self._num_steps):
            self._got_on = now
        elif stats is not None:  # within a step its ranks may have got on
            self._got_on = max(self._got_on, now - stats.seconds_without_progress)
        if stats is not None:
            self._num_steps = stats.num_steps_total

    @property
    def seconds_without_progress(self) -> float:
        return time.monotonic() - self._got_on

    @property
    def seconds_unheard(self) -> float:
        return time.monotonic() - self._heard
