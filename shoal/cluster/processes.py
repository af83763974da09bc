"""The processes of a node: found by session and parentage, told from strangers by when they started, and ended.

Linux only (/proc), as Ray clusters of several machines are. `node` calls it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from shoal.network.node_record import ProcessRecord

_POLL_SECONDS = 0.05


class Entry(NamedTuple):
    """One line of the process table. `name`: the program, 15 characters at most."""

    process: ProcessRecord
    name: str
    parent: int
    session: int


def table() -> dict[int, Entry]:
    """All processes that run, by pid. Those that have ended and wait for their parent do not count."""
    entries = (_read(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdecimal())
    return {entry.process.pid: entry for entry in entries if entry is not None}


def identify(pid: int) -> ProcessRecord | None:
    """The process with this pid now; None where there is none."""
    entry = _read(pid)
    return entry.process if entry is not None else None


def is_alive(process: ProcessRecord) -> bool:
    entry = _read(process.pid)
    return entry is not None and entry.process == process


def alive(processes: Iterable[ProcessRecord]) -> list[ProcessRecord]:
    return [process for process in processes if is_alive(process)]


def in_session(session: int) -> list[Entry]:
    """The processes of a session, in the order of their start."""
    members = [entry for entry in table().values() if entry.session == session]
    return sorted(members, key=lambda entry: (entry.process.started, entry.process.pid))


def with_descendants(processes: Iterable[ProcessRecord]) -> list[ProcessRecord]:
    """These processes, as far as they are alive, and all that descend from them."""
    entries = table()
    found = {process.pid: process for process in processes if process.pid in entries and is_alive(process)}
    while True:
        more = [entry for entry in entries.values() if entry.parent in found and entry.process.pid not in found]
        if not more:
            return list(found.values())
        found |= {entry.process.pid: entry.process for entry in more}


def command_line(process: ProcessRecord) -> str:
    """ "" for a process that is gone."""
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def send(processes: Iterable[ProcessRecord], number: signal.Signals) -> None:
    """A signal to each that still is the process it was."""
    for process in processes:
        if is_alive(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def wait_for_end(processes: Sequence[ProcessRecord], seconds: float) -> list[ProcessRecord]:
    """Wait until none is alive, so many seconds at most; returns those that still are."""
    deadline = time.monotonic() + seconds
    while (left := alive(processes)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return left


def _read(pid: int) -> Entry | None:
    """proc(5), stat: the name stands in parentheses and may hold any character; the rest is fields 3 and on."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    if fields[0] in "ZX":
        return None
    return Entry(ProcessRecord(pid, int(fields[19])), name, int(fields[1]), int(fields[3]))
