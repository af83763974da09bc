"""A worker's process on this host: started, watched and ended. Launchers use it, on each host where they start some."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from shoal.errors import StartupError
from shoal.executor.launcher import describe_exit

_KILL_SECONDS = 5.0


class WorkerProcess:
    """Starts at once.

    The thread that starts the process waits for it: the kernel, told so by the worker, kills it when that thread is
    gone. So however this process ends, the worker does, even one that was stopped and cannot see it.
    """

    def __init__(
        self,
        command: Sequence[str],
        token: str,
        environment: Mapping[str, str],
        on_exit: Callable[[str], None],
        output: int | None = None,
    ) -> None:
        """on_exit: called once, from a thread, with how the process ended. output: the descriptor that it writes both
        its outputs to; None: this process's. Raises StartupError when it cannot start."""
        self._command = [*command, "--end-with-thread"]
        self._token, self._environment, self._on_exit, self._output = token, environment, on_exit, output
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        self._started, self._ended = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="worker-process", daemon=True).start()
        self._started.wait()
        if self._error is not None:
            raise StartupError(f"cannot start a worker, {command[0]}: {self._error}") from self._error

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _run(self) -> None:
        try:
            self._process = process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=self._output,
                env=dict(self._environment),
                bufsize=0,
            )
        except OSError as error:
            self._error = error
            return
        finally:
            self._started.set()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already: that is reported
            process.stdin.write(json.dumps({"token": self._token}).encode() + b"\n")
        returncode = process.wait()
        # Open until now: its end tells the worker that this process is gone.
        process.stdin.close()
        self._ended.set()
        self._on_exit(describe_exit(returncode))

    def wait(self, deadline: float) -> bool:
        """Whether the process has ended by `deadline`, on the monotonic clock."""
        return self._ended.wait(max(deadline - time.monotonic(), 0.0))

    def kill(self) -> None:
        """End it by force, and return when it is gone (or cannot be ended, as the kernel is busy for it)."""
        self.begin_kill()
        self._ended.wait(_KILL_SECONDS)

    def begin_kill(self) -> None:
        """As `kill`, and return at once: a process with much memory, a GPU's above all, is not gone in a moment."""
        assert self._process is not None
        if not self._ended.is_set():
            self._process.kill()
