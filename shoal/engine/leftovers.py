"""What a process leaves behind: the processes that it started and that did not end with it. Used by client.py.

A core that was killed cannot end its ranks. They end by themselves when they notice, but not those that are stopped or
hang, and a new core needs the memory that they hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence

import psutil

_POLL_SECONDS = 0.01
_OWN_SECONDS = 3.0
_KILLED_SECONDS = 10.0


def descendants(process_id: int) -> Sequence[psutil.Process]:
    """The processes below this one; none when it is gone."""
    try:
        return psutil.Process(process_id).children(recursive=True)
    except psutil.Error:
        return ()


async def end_leftovers(processes: Sequence[psutil.Process], own_seconds: float = _OWN_SECONDS) -> Sequence[int]:
    """Wait until they are gone; kill those that have not ended by themselves. Returns the ids of those that were."""
    left = await _wait(processes, own_seconds)
    for process in left:
        with contextlib.suppress(psutil.Error):  # gone in this moment
            process.kill()
    await _wait(left, _KILLED_SECONDS)
    return [process.pid for process in left]


async def _wait(processes: Sequence[psutil.Process], seconds: float) -> Sequence[psutil.Process]:
    deadline = time.monotonic() + seconds
    left = [process for process in processes if _runs(process)]
    while left and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_SECONDS)
        left = [process for process in left if _runs(process)]
    return left


def _runs(process: psutil.Process) -> bool:
    """Whether it is there; one that has ended and that nobody has waited for is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
