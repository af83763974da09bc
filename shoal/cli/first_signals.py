"""What Ctrl-C and SIGTERM do to `shoal serve` before the server, or a node's agent, has set handlers of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def ends_at_once() -> Iterator[None]:
    """There is nothing to end yet, and the exit code is that of every end in order: 0.

    What nohup has this process ignore stays so. Where this is not the main thread, signals are somebody else's.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, _end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    """Not by an exception: in the middle of an import it would be swallowed, or come out as another."""
    os.write(2, b"stopped while starting\n")
    os._exit(0)
