"""The end of a core whose parent is gone. A thread of the core's process runs it; stand-ins of the core do too."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(endpoints: Sequence[str]) -> None:
    """Read standard input to its end, which comes when the parent has closed it or died; then end at once.

    A parent that was killed could not remove its sockets and their directory: so this does, and touches nothing else.
    A process that is stopped would not see the end: so the kernel is asked to continue it when the parent dies.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
    while os.read(sys.stdin.fileno(), 4096):
        pass
    sockets = [Path(endpoint.removeprefix("ipc://")) for endpoint in endpoints if endpoint.startswith("ipc://")]
    with contextlib.suppress(OSError):
        for path in sockets:
            path.unlink(missing_ok=True)
        for directory in {path.parent for path in sockets}:
            directory.rmdir()  # refused where anything else lies in it
    os._exit(3)
