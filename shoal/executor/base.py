"""Executor: how the engine core reaches its workers. Implementations: uniproc, distributed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from shoal.distributed.status import RankStatus, describe_stall
from shoal.errors import EngineDeadError
from shoal.messages import BatchResult, ScheduledBatch, StartupProgress


class Executor(ABC):
    """Runs steps on all workers of one engine, in the order in which they are given."""

    @abstractmethod
    def start(self, on_progress: Callable[[StartupProgress], None]) -> dict[str, Any]:
        """Bring the workers up: load the model, size the KV cache.

        Returns facts about the engine, among them `num_blocks` (the null block counted).
        Raises ModelError, ConfigError or StartupError.
        """

    @abstractmethod
    def execute(self, batch: ScheduledBatch) -> None:
        """Start the forward pass of a step; returns at once. Errors come with the step's `sample`."""

    @abstractmethod
    def sample(self, step_id: int, grammar_masks: dict[int, bytes] | None = None) -> Future[BatchResult]:
        """Choose tokens for the step that was given to `execute`; returns at once.

        grammar_masks: slot -> ceil(vocabulary / 32) little-endian int32 words, bit i of word w allows token 32 * w + i;
        for constrained requests only. They may be made while the forward pass runs.
        """

    def stage_busy_seconds(self) -> list[float]:
        """How long each pipeline stage has computed since the start; none where there is one stage. Called several
        times a second, so from what the workers' status records say, without asking them."""
        return []

    def rank_statuses(self) -> list[RankStatus]:
        """What every rank of this engine did last, by rank. Called several times a second, from any thread."""
        return []

    def tell_counts(self) -> float:
        """No step is under way: have every rank bring its status up to date, with all that it has counted. Returns at
        once; `rank_statuses` has it after so many seconds."""
        return 0.0

    def explain_stall(self) -> str:
        """One line for a step that does not end: which rank is where."""
        return describe_stall(self.rank_statuses())

    def give_up(self) -> None:  # noqa: B027
        """A step never ends: `shutdown` must not wait for it."""

    def watch(self, on_failure: Callable[[EngineDeadError], None]) -> None:  # noqa: B027
        """Call `on_failure`, once and from any thread, when the engine is lost, also while no step runs.

        Workers in the core's process are lost with it only.
        """

    def abandon(self) -> None:  # noqa: B027
        """This process ends in a moment, in the middle of its start: tell the other hosts. From any thread."""

    @abstractmethod
    def shutdown(self) -> None:
        """End the workers and give their memory back. May be called twice."""
