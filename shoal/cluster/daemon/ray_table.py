"""Ray's table of nodes, as its head tells it, for those who ask the daemon. A process beside it keeps it up meanwhile.

Loading Ray takes a second of a core each time, so it is loaded once for many questions, and never into the daemon.
"""

from __future__ import annotations

import subprocess
import threading
import time

import msgspec

from shoal.errors import StartupError
from shoal.executor import ray_head

_FIRST_SECONDS = 15.0
# Nobody has asked for so long: the process goes.
_UNASKED_SECONDS = 60.0


class RayTable:
    """`read` is for any thread."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._process: subprocess.Popen[bytes] | None = None
        self._head = ""
        self._answer: ray_head.Answer | None = None
        self._answered_at = self._asked_at = 0.0

    def read(self, head: str) -> ray_head.Answer:
        """What the head at ADDRESS:PORT says now. Raises StartupError where it says nothing."""
        with self._lock:
            self._asked_at = asked_at = time.monotonic()
            if self._process is None or self._process.poll() is not None or head != self._head:
                self._stop()
                self._start(head)
            process = self._process
            self._news.wait_for(lambda: self._answered_at > asked_at or self._is_over(process), _FIRST_SECONDS)
            answer = self._answer if self._answered_at > asked_at else None
        if answer is not None and not answer.refused:
            return answer
        return ray_head.ask_head(head, self._token)  # for its words

    def stop_unasked(self) -> None:
        """Called now and then."""
        with self._lock:
            if time.monotonic() - self._asked_at > _UNASKED_SECONDS:
                self._stop()

    def stop(self) -> None:
        with self._lock:
            self._stop()

    def _is_over(self, process: subprocess.Popen[bytes] | None) -> bool:
        return process is None or process is not self._process or process.poll() is not None

    def _start(self, head: str) -> None:
        self._head = head
        try:
            self._process = ray_head.follow_head(head, self._token)
        except OSError as error:
            raise StartupError(f"cannot ask Ray's head: {error}") from error
        threading.Thread(target=self._read, args=(self._process,), name="ray-table", daemon=True).start()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._answer = None

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                try:
                    answer = ray_head.decode_answer(line)
                except msgspec.MsgspecError:
                    continue  # Ray's own words
                with self._lock:
                    if self._process is process:
                        self._answer, self._answered_at = answer, time.monotonic()
                        self._news.notify_all()
        process.wait()
        with self._lock:
            self._news.notify_all()
