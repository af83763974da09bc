"""A program that shall run until it is told to stop: started, watched, started again with back-off. Actors hold one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shoal import env
from shoal.cluster.deploy.records import Report
from shoal.errors import ShoalError

_BACKOFF_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
# Who ran for so long begins anew with short waits.
_SOUND_SECONDS = 60.0
_PROBE_SECONDS = 0.5
_KEEPER = "shoal.cluster.deploy.keeper"


@dataclasses.dataclass(frozen=True)
class Command:
    """One start of the program: what to run, and the URL under which it will be."""

    arguments: list[str]
    environment: Mapping[str, str]
    url: str


@dataclasses.dataclass(frozen=True)
class Condition:
    """What a look at the program found. hopeless: it must be started anew."""

    ready: bool = False
    why: str = ""
    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0
    hopeless: bool = False


class Service:
    """Two threads: one starts and waits, one looks at how the program is. `report` never blocks."""

    def __init__(
        self,
        make_command: Callable[[Path], Command],
        look: Callable[[str], Condition],
        grace: float,
        node: str,
        *,
        backoff: tuple[float, ...] = _BACKOFF_SECONDS,
    ) -> None:
        """make_command: for each start, with the directory for its files. look: what it says at its URL."""
        self._make_command, self._look, self._grace, self._backoff = make_command, look, grace, backoff
        self.directory = Path(tempfile.mkdtemp(prefix="shoal-deploy-"))
        self._lock = threading.Lock()
        self._report = Report(node=node)
        self._news: queue.Queue[dict[str, Any]] = queue.Queue()
        self._stopping, self._stopped = threading.Event(), threading.Event()
        self._keeper: subprocess.Popen[str] | None = None
        self._main = threading.Thread(target=self._run, name="service", daemon=True)
        self._prober = threading.Thread(target=self._probe, name="probe", daemon=True)

    def start(self) -> None:
        self._main.start()
        self._prober.start()

    @property
    def started(self) -> bool:
        return self._main.ident is not None

    def report(self) -> Report:
        """A copy of what is known now."""
        with self._lock:
            return Report(**{name: getattr(self._report, name) for name in Report.__struct_fields__})

    def stop(self) -> None:
        """Begin the end: SIGTERM, and SIGKILL after the grace. The report says "stopped" when it is done."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._set(state="stopping", why="")
        self._news.put({"news": "stop"})
        if not self.started:
            self._ended()

    def wait_stopped(self, seconds: float) -> bool:
        return self._stopped.wait(seconds)

    def _set(self, **changes: Any) -> None:
        with self._lock:
            for name, value in changes.items():
                setattr(self._report, name, value)

    # --- start, wait, start again ------------------------------------------------------------------------------------

    def _run(self) -> None:
        num_ends = 0
        try:
            while not self._stopping.is_set():
                began = time.monotonic()
                why = self._run_once()
                if self._stopping.is_set():
                    break
                was_ready = self.report().state in ("ready", "unhealthy")
                num_ends = 1 if time.monotonic() - began > _SOUND_SECONDS else num_ends + 1
                report = self.report()
                self._set(
                    state="restarting",
                    why=why,
                    pid=None,
                    started=None,
                    waiting=0,
                    running=0,
                    kv_usage=0.0,
                    num_restarts=report.num_restarts + 1,
                    num_early_ends=0 if was_ready else report.num_early_ends + 1,
                )
                self._stopping.wait(self._backoff[min(num_ends, len(self._backoff)) - 1])
        finally:
            self._end_keeper()
            self._ended()

    def _ended(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self._set(state="stopped", pid=None, url=None)
        self._stopped.set()

    def _run_once(self) -> str:
        """One life of the program; how it ended."""
        try:
            command = self._make_command(self.directory)
            keeper = self._with_keeper()
            order = {"command": command.arguments, "environment": dict(command.environment), "grace": self._grace}
            self._order(keeper, {"do": "start", **order})
        except (OSError, ShoalError) as error:
            self._end_keeper()
            return f"cannot be started: {error}"
        self._set(state="starting", why="", url=command.url)
        pid = None
        while True:
            news = self._news.get()
            match news["news"]:
                case "started":
                    pid = news["pid"]
                    self._set(pid=pid, started=time.time())
                case "ended":
                    return ": ".join(filter(None, (news["how"], _gist(news["last"]))))
                case "keeper is gone" if news["keeper"] == keeper.pid:
                    self._keeper = None
                    if pid is not None:
                        _kill_group(pid)
                    return "its keeper was killed"
                case "hopeless":
                    if self.report().pid == news["pid"]:
                        with contextlib.suppress(OSError):
                            self._order(keeper, {"do": "kill"})
                case "stop":
                    return "was told to stop"

    def _with_keeper(self) -> subprocess.Popen[str]:
        if self._keeper is None or self._keeper.poll() is not None:
            self.directory.mkdir(mode=0o700, exist_ok=True)
            self._keeper = subprocess.Popen(
                [sys.executable, "-m", _KEEPER, str(self.directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=env.initial_environment(),
                process_group=0,  # Ray kills the group of an actor that has died
            )
            threading.Thread(target=self._listen, args=(self._keeper,), name="news", daemon=True).start()
        return self._keeper

    def _listen(self, keeper: subprocess.Popen[str]) -> None:
        assert keeper.stdout is not None
        for line in keeper.stdout:
            self._news.put(json.loads(line))
        keeper.wait()
        self._news.put({"news": "keeper is gone", "keeper": keeper.pid})

    def _order(self, keeper: subprocess.Popen[str], order: dict[str, Any]) -> None:
        assert keeper.stdin is not None
        keeper.stdin.write(json.dumps(order) + "\n")
        keeper.stdin.flush()

    def _end_keeper(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is None or keeper.poll() is not None:
            return
        with contextlib.suppress(OSError):
            self._order(keeper, {"do": "stop", "grace": self._grace})
        keeper.wait()

    # --- how it is ---------------------------------------------------------------------------------------------------

    def _probe(self) -> None:
        while not self._stopped.wait(_PROBE_SECONDS):
            before = self.report()
            if before.pid is None or before.url is None:
                continue
            found = self._look(before.url)
            with self._lock:
                report = self._report
                if report.pid != before.pid or report.state in ("restarting", "stopped"):
                    continue
                report.waiting, report.running, report.kv_usage = found.waiting, found.running, found.kv_usage
                if self._stopping.is_set():
                    continue
                if found.ready:
                    report.state, report.why, report.was_ready, report.num_early_ends = "ready", "", True, 0
                else:
                    report.state = "unhealthy" if report.state in ("ready", "unhealthy") else "starting"
                    report.why = found.why
            if found.hopeless:
                self._news.put({"news": "hopeless", "pid": before.pid})


def _gist(lines: list[str]) -> str:
    """The line that gives the reason: Shoal's own error, else the last one that says something."""
    said = [line.strip() for line in lines if line.strip()]
    ours = [line for line in said if "shoal: error:" in line]
    return (ours or said or [""])[-1]


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
