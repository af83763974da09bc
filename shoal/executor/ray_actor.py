"""WorkerActor: what Ray runs on a node for one rank. It starts the worker's process there, waits for it, hands on its
output, and ends it; nothing of a step comes here. RayLauncher makes one a rank."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from shoal import env
from shoal.executor.worker_process import WorkerProcess

# Lines that wait for the engine core to fetch them. More than it keeps up with are counted, not kept.
_MOST_LINES = 10_000
# For the answer to a call to leave this process.
_ANSWER_SECONDS = 0.5


class WorkerActor:
    """Its methods block in threads of their own (`max_concurrency`). The worker ends with the actor's process."""

    def __init__(self) -> None:
        self._process: WorkerProcess | None = None
        self._how = ""
        self._ended = threading.Event()
        self._lines: deque[str] = deque()
        self._num_lost = 0
        self._open = True
        self._changed = threading.Condition()

    def place(self) -> dict[str, Any]:
        """Where it came to be: pid, host name, and the GPUs that Ray gave it."""
        import ray

        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return {"pid": os.getpid(), "hostname": socket.gethostname(), "gpus": gpus}

    def start(self, arguments: Sequence[str], token: str, variables: Mapping[str, str]) -> int:
        """Start the worker with this host's Python; returns its pid.

        variables: count where this node does not set them itself (but for CUDA_VISIBLE_DEVICES, which Ray decides).
        """
        reading, writing = os.pipe()
        environment = {**variables, **env.initial_environment()}
        if "CUDA_VISIBLE_DEVICES" in variables:
            environment["CUDA_VISIBLE_DEVICES"] = variables["CUDA_VISIBLE_DEVICES"]
        # What is Ray's, and the key of the cluster, is none of the worker's business.
        environment = {
            name: value
            for name, value in environment.items()
            if not name.startswith("RAY_") and name != "SHOAL_CLUSTER_TOKEN"
        }
        try:
            self._process = WorkerProcess([sys.executable, *arguments], token, environment, self._on_exit, writing)
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        threading.Thread(target=self._read, args=(reading,), name="worker-output", daemon=True).start()
        return self._process.pid

    def wait(self) -> str:
        """Returns when the worker has ended, and how it did."""
        self._ended.wait()
        return self._how

    def output(self) -> list[str] | None:
        """The lines that the worker has written since the last call, once there are any; None after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or not self._open)
            lines = list(self._lines)
            if self._num_lost:
                lines.append(f"({self._num_lost} more lines came too fast)")
            self._lines.clear()
            self._num_lost = 0
            return lines or None

    def kill(self, then_leave: bool) -> None:
        """End the worker by force; returns when it is gone. then_leave: this process ends too, as Ray cannot end it."""
        if self._process is not None:
            self._process.kill()
        if then_leave:
            threading.Timer(_ANSWER_SECONDS, os._exit, (0,)).start()

    def _on_exit(self, how: str) -> None:
        self._how = how
        self._ended.set()

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor, encoding="utf-8", errors="replace") as stream:
            for line in stream:
                with self._changed:
                    if len(self._lines) < _MOST_LINES:
                        self._lines.append(line.rstrip("\n"))
                    else:
                        self._num_lost += 1
                    self._changed.notify_all()
        with self._changed:
            self._open = False
            self._changed.notify_all()
