"""watch: looks at the cores from outside, once a second. A task of AsyncEngine."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence

from shoal.config.parallel import ParallelConfig
from shoal.engine.client import EXECUTORS_OWN_SECONDS, ReplicaStatus

# Without a step for so long although there is work, the engine does not progress.
DEFAULT_PROGRESS_TIMEOUT = 60.0
_WATCH_SECONDS = 1.0


async def watch(
    parallel: ParallelConfig,
    replicas: Callable[[], Sequence[ReplicaStatus]],
    kill: Callable[[str, int], None],
    look_at_waiting: Callable[[float], None],
) -> None:
    """End a core that makes no step any more and cannot say so itself: stopped, or stuck in a driver.

    kill: ends a core (why, its index). look_at_waiting: is told the time (time.monotonic()), each round.
    """
    # An executor of several ranks keeps the same deadline, and can say which of them waits for what.
    limit = parallel.step_timeout + (EXECUTORS_OWN_SECONDS if parallel.world_size > 1 else 0.0)
    longest_silence = parallel.stall_timeout or math.inf
    late: dict[int, str] = {}
    while True:
        await asyncio.sleep(min(limit / 4, longest_silence / 8, _WATCH_SECONDS))
        look_at_waiting(time.monotonic())
        before, late = late, {}
        for replica in replicas():
            if replica.failure is not None:
                continue
            if replica.seconds_unheard >= longest_silence:
                late[replica.index] = f"said nothing for {longest_silence:g} s although it has work (--stall-timeout)"
            elif replica.seconds_without_progress >= limit:
                why = "--step-timeout"
                if limit > parallel.step_timeout:
                    why += f" is {parallel.step_timeout:g} s, and the core itself did not act on it"
                late[replica.index] = f"made no step for {limit:g} s although it has work ({why})"
        # Late twice in a row: the first time it may be this process that was stopped, with the news unread.
        for index in late.keys() & before.keys():
            kill(f"{late[index]}, and was ended", index)
