"""What a run may leave behind, and must not: processes, shared memory, files."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

VARIABLE = "CHAOS_RUN"
_SHARED_MEMORY = Path("/dev/shm")


def processes_of(token: str) -> list[str]:
    """All processes that were started in a run, whoever their parent is now: each inherited the run's variable."""
    wanted = f"{VARIABLE}={token}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found.append(f"{entry.name} {command or '(ended, not waited for)'}")
    return found


class Footprint:
    """The shared memory before a run; what is new afterwards and belongs to no living process was leaked."""

    def __init__(self) -> None:
        self._before = set(_names())

    def leaked(self) -> list[str]:
        new = set(_names()) - self._before
        return sorted(str(_SHARED_MEMORY / name) for name in new - _held()) if new else []


def wait_until_gone(token: str, timeout: float) -> list[str]:
    """What still runs after so many seconds."""
    deadline = time.monotonic() + timeout
    while (left := processes_of(token)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _names() -> list[str]:
    return [entry.name for entry in _SHARED_MEMORY.iterdir()] if _SHARED_MEMORY.is_dir() else []


def _held() -> set[str]:
    """Names under /dev/shm that some process has open or mapped: other people's runs on this machine."""
    held = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            for line in (process / "maps").read_text().splitlines():
                _, _, name = line.partition(f"{_SHARED_MEMORY}/")
                held.add(name.split("/")[0])
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(descriptor)
                    if target.startswith(f"{_SHARED_MEMORY}/"):
                        held.add(target.split("/")[3])
    return held
