"""The end of a core whose parent is gone. A thread of the core's process runs it; stand-ins of the core do too."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

# What a parent writes before it closes standard input in order.
GOODBYE = b"goodbye\n"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# For last words to other hosts.
LAST_WORDS_SECONDS = 4.0


def end_with_parent(endpoints: Sequence[str], say_last_words: Callable[[], None] = lambda: None) -> None:
    """Read standard input to its end, which comes when the parent has closed it or died; then end at once.

    say_last_words: called, and waited for a few seconds, where the parent says goodbye and has not died.

    A parent that was killed could not remove its sockets and their directory: so this does, and touches nothing else.
    A process that is stopped would not see the end: so the kernel is asked to continue it when the parent dies.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    said = b""
    while read := os.read(sys.stdin.fileno(), 4096):
        said = (said + read)[-len(GOODBYE) :]
    if said == GOODBYE:
        last_words = threading.Thread(target=say_last_words, name="last-words", daemon=True)
        last_words.start()
        last_words.join(LAST_WORDS_SECONDS)
    sockets = [Path(endpoint.removeprefix("ipc://")) for endpoint in endpoints if endpoint.startswith("ipc://")]
    with contextlib.suppress(OSError):
        for path in sockets:
            path.unlink(missing_ok=True)
        for directory in {path.parent for path in sockets}:
            directory.rmdir()  # refused where anything else lies in it
    os._exit(3)
