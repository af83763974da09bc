"""What LLM shows while it works: the engine coming up, and a bar over the prompts with tokens per second. On stderr."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shoal.messages import EngineStats, StartupProgress


class StartupDisplay:
    """A line that says what the engine does while it comes up; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._status = console.status("starting the engine") if console.is_terminal else None

    def __enter__(self) -> StartupDisplay:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, progress: StartupProgress) -> None:
        """Take news of the engine's start."""
        if self._status is not None:
            share = f" {100 * progress.done // progress.total} %" if progress.total else ""
            self._status.update(f"starting the engine: {progress.phase}{share}")


class PromptBar:
    """A progress bar over the prompts of one call. `shown` off: it does nothing."""

    def __init__(self, num_prompts: int, stats: EngineStats, shown: bool) -> None:
        self._start_stats = stats
        self._start_time = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[speed]}"),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._task = self._bar.add_task("Prompts", total=num_prompts, speed="")

    def __enter__(self) -> PromptBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, num_done: int, stats: EngineStats) -> None:
        """Draw the state: prompts that are done, and the engine's counters of tokens."""
        seconds = max(time.monotonic() - self._start_time, 1e-3)
        num_in = stats.prompt_tokens_total - self._start_stats.prompt_tokens_total
        num_out = stats.generation_tokens_total - self._start_stats.generation_tokens_total
        speed = f"{num_in / seconds:,.0f} tok/s in, {num_out / seconds:,.0f} tok/s out"
        self._bar.update(self._task, completed=num_done, speed=speed)
