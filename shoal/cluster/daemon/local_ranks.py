"""The ranks and servers of Shoal that run on this machine, found in /proc: nobody has to say that they are there, and
nothing is left of those that have died. Ranks' status records are memory that processes share (distributed.status).

What other users run, and what runs in containers of their own, is not seen.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from shoal.cluster.daemon.reports import RankProgress, ServerReport
from shoal.distributed.status import RankStatus, StatusBoard

_SCAN_SECONDS = 2.0
_PROGRAMS = ("shoal.worker", "shoal.engine")
_SERVERS = ("serve", "router")
_BOARD = "/memfd:shoal-status"


class LocalRanks:
    """Finds status boards now and then, and reads them whenever it is asked. For one thread."""

    def __init__(self) -> None:
        self._boards: dict[int, StatusBoard] = {}  # by inode: all ranks of a host, and their core, hold the same
        self._scanned_at = float("-inf")

    def read(self, now: float) -> list[RankProgress]:
        """What each rank on this machine is doing, by process."""
        if now - self._scanned_at >= _SCAN_SECONDS:
            self._scanned_at = now
            self._scan()
        records: list[RankStatus] = []
        for board in self._boards.values():
            records += board.read()
        return [
            RankProgress(
                rank=record.rank,
                world_size=record.data_size * record.pipeline_size * record.tensor_size,
                pid=record.pid,
                step=record.step,
                phase=record.phase,
                seconds=round(max(record.seconds_since_progress, 0.0), 3),
            )
            for record in records
            if os.path.exists(f"/proc/{record.pid}")
        ]

    def _scan(self) -> None:
        found: dict[int, StatusBoard] = {}
        for pid in _pids_of(_PROGRAMS):
            for path, inode in _boards_of(pid):
                if inode not in found:
                    with contextlib.suppress(OSError, ValueError):
                        found[inode] = self._boards.get(inode) or StatusBoard.open(path)
        self._boards = found


def local_servers() -> list[ServerReport]:
    """Servers and routers on this machine, and where they listen."""
    found = []
    for pid, words in _commands():
        place = next((index for index, word in enumerate(words[:4]) if _is_shoal(word)), None)
        command = words[place + 1 :] if place is not None else []
        if not command or command[0] not in _SERVERS:
            continue
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            connections = process.net_connections("tcp")
            ports = sorted({each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN})
            seconds = time.time() - process.create_time()
            model = _model_of(command[1:]) if command[0] == "serve" else ""
            found.append(ServerReport(command[0], pid, model, round(seconds, 1), ports))
    return found


def _is_shoal(word: str) -> bool:
    return word == "shoal.cli" or os.path.basename(word) == "shoal"


def _model_of(arguments: list[str]) -> str:
    """As typed: the bare argument, --model, or the file that says it."""
    for index, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name in ("--model", "--config"):
            return value if equals else arguments[index + 1] if index + 1 < len(arguments) else ""
    return arguments[0] if arguments and not arguments[0].startswith("-") else ""


def _pids_of(programs: Iterable[str]) -> Iterator[int]:
    for pid, words in _commands():
        if any(program in words[:4] for program in programs):
            yield pid


def _commands() -> Iterator[tuple[int, list[str]]]:
    """The command lines of the Python processes in this network namespace, each of which is a machine of its own."""
    here = os.stat("/proc/self/ns/net").st_ino
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            data = Path(f"/proc/{name}/cmdline").read_bytes()
            if b"shoal" in data and os.stat(f"/proc/{name}/ns/net").st_ino == here:
                yield int(name), [os.fsdecode(word) for word in data.rstrip(b"\0").split(b"\0")]


def _boards_of(pid: int) -> Iterator[tuple[str, int]]:
    """Path and inode of each file of a process that is a status board."""
    directory = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            path = f"{directory}/{name}"
            with contextlib.suppress(OSError):
                if os.readlink(path).startswith(_BOARD):
                    yield path, os.stat(path).st_ino
