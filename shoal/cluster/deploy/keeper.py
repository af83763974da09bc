"""Keeps one program after another for an actor, and ends the one that runs when the actor is gone, however it died.

Runs as `python -m shoal.cluster.deploy.keeper DIRECTORY`. Orders come as lines of JSON on standard input, news go out
on standard output; the end of standard input is an order to stop. The directory goes with the keeper.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import logging.handlers
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import IO, Any

LOG_NAME = "output.log"
_LOG_BYTES = 8 << 20
_LAST_LINES = 20
_PR_SET_PDEATHSIG = 1
_DEFAULT_GRACE = 60.0
# A killed process is gone after this, unless the kernel is busy for it.
_KILLED_SECONDS = 10.0


class Keeper:
    """Programs are started by the main thread, whose end the kernel tells them of by SIGTERM."""

    def __init__(self, directory: str, news: IO[str]) -> None:
        self._directory = directory
        self._news = news
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._watcher: threading.Thread | None = None
        self._grace = _DEFAULT_GRACE
        self._log = logging.getLogger("output")
        handler = logging.handlers.RotatingFileHandler(
            Path(directory) / LOG_NAME, maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8", errors="replace"
        )
        handler.setFormatter(logging.Formatter("%(message)s"))
        self._log.addHandler(handler)
        self._log.setLevel(logging.INFO)
        self._log.propagate = False

    def run(self, orders: IO[str]) -> None:
        """Until the orders end, or one says stop."""
        try:
            for line in orders:
                order = json.loads(line)
                if order["do"] == "stop":
                    self._grace = order["grace"]
                    break
                if order["do"] == "kill":
                    self._signal(signal.SIGKILL)
                else:
                    self._start(order)
        finally:
            self._stop()
            shutil.rmtree(self._directory, ignore_errors=True)

    def _start(self, order: dict[str, Any]) -> None:
        self._grace = order["grace"]
        try:
            self._process = subprocess.Popen(
                ends_with_this_process(order["command"]),
                env=order["environment"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                process_group=0,
            )
        except OSError as error:
            self._say(news="ended", how=f"cannot be started: {error}", last=[])
            return
        self._say(news="started", pid=self._process.pid)
        self._watcher = threading.Thread(target=self._watch, args=(self._process,), name="watch")
        self._watcher.start()

    def _watch(self, process: subprocess.Popen[str]) -> None:
        last: deque[str] = deque(maxlen=_LAST_LINES)
        reader = threading.Thread(target=self._read, args=(process, last), daemon=True, name="output")
        reader.start()
        code = process.wait()
        # What it started and left behind: nothing of it may live on, or hold its output open.
        _signal_group(process.pid, signal.SIGKILL)
        reader.join(1.0)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        self._say(news="ended", how=how, last=list(last))

    def _read(self, process: subprocess.Popen[str], last: deque[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line.rstrip("\n"))
            self._log.info("%s", line.rstrip("\n"))

    def _stop(self) -> None:
        if self._process is None or self._watcher is None:
            return
        self._signal(signal.SIGTERM)
        self._watcher.join(self._grace)
        if self._watcher.is_alive():
            _signal_group(self._process.pid, signal.SIGKILL)
            self._watcher.join(_KILLED_SECONDS)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _say(self, **news: Any) -> None:
        # The actor may be gone.
        with self._lock, contextlib.suppress(OSError, ValueError):
            print(json.dumps(news), file=self._news, flush=True)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def ends_with_this_process(command: list[str]) -> list[str]:
    """What to start, in the main thread, in the place of `command`: it gets SIGTERM when this process is gone."""
    return [sys.executable, "-m", "shoal.cluster.deploy.keeper", "--then", str(os.getpid()), *command]


def _become(keeper: int, command: list[str]) -> None:
    """This process becomes the program, which the kernel ends when the keeper's main thread is gone."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")
    if os.getppid() != keeper:
        sys.exit("the keeper is gone")
    os.execvp(command[0], command)


def _exit_once(*_: object) -> None:
    """As the end of standard input. What follows is not to be interrupted by the next signal."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)


def main() -> None:
    if sys.argv[1] == "--then":
        try:
            _become(int(sys.argv[2]), sys.argv[3:])
        except OSError as error:
            sys.exit(f"cannot start {sys.argv[3]}: {error.strerror or error}")
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _exit_once)
    Keeper(sys.argv[1], sys.stdout).run(sys.stdin)


if __name__ == "__main__":
    main()
