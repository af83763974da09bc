"""The service "verify.hash" of node daemons: SHA-256 of what lies at a path, with news of how far it is.

Hashing takes minutes, so it is a job: the asker names it and asks again until it is done; who stops asking ends it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from shoal.checksum import SumCache, TreeSums, hash_tree
from shoal.cluster.daemon.wire import NodeView, Service
from shoal.config.model_path import resolve_model_path
from shoal.errors import ModelError, ShoalError

# An answer comes as soon as the job is done, or after this.
_ANSWER_SECONDS = 0.5
_FORGET_SECONDS = 15.0


class HashRequest(msgspec.Struct, frozen=True):
    """job: made up by the asker. also: names (bytes) of files that count although they would be left out."""

    job: str
    path: str
    num_jobs: int | None = None
    use_cache: bool = True
    also: list[bytes] = []


class HashAnswer(msgspec.Struct, frozen=True):
    """How far it is, in bytes; when done, sums and reasons by name (bytes), or why there are none at all."""

    done: bool
    num_bytes: int
    num_read: int
    error: str = ""
    sums: dict[bytes, str] = {}
    unreadable: dict[bytes, str] = {}
    num_cached: int = 0
    seconds: float = 0.0


def find_root(path: str) -> Path:
    """What is at a path, or where a model of the hub lies on this machine. Links stay, for messages name them.

    Raises ModelError that says how far the path is right.
    """
    given = Path(path).expanduser()
    return given.absolute() if given.exists() else resolve_model_path(path)


class HashJobs:
    """The jobs of one daemon, by name. Threads may share it. locate: what is at a path, see `find_root`."""

    def __init__(self, locate: Callable[[str], Path] = find_root) -> None:
        self._locate = locate
        self._lock = threading.Lock()
        self._jobs: dict[str, _Job] = {}

    def run(self, _: NodeView, request: HashRequest) -> HashAnswer:
        """Begin the job unless it is there; wait a moment for its end."""
        with self._lock:
            self._jobs = {name: job for name, job in self._jobs.items() if not job.is_forgotten()}
            job = self._jobs.get(request.job)
            if job is None:
                job = self._jobs[request.job] = _Job(request, self._locate)
        return job.answer()


class _Job:
    def __init__(self, request: HashRequest, locate: Callable[[str], Path]) -> None:
        self._request, self._locate = request, locate
        self._asked = time.monotonic()
        self._stop, self._done = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._num_bytes = self._num_read = 0
        self._result: TreeSums | ShoalError | None = None
        threading.Thread(target=self._run, name="verify.hash", daemon=True).start()

    def is_forgotten(self) -> bool:
        return time.monotonic() - self._asked > _FORGET_SECONDS

    def answer(self) -> HashAnswer:
        self._asked = time.monotonic()
        done = self._done.wait(_ANSWER_SECONDS)
        self._asked = time.monotonic()
        match self._result if done else None:
            case TreeSums() as found:
                return HashAnswer(
                    done=True,
                    num_bytes=found.num_bytes,
                    num_read=found.num_bytes,
                    sums={os.fsencode(name): digest for name, digest in found.sums.items()},
                    unreadable={os.fsencode(name): reason for name, reason in found.unreadable.items()},
                    num_cached=found.num_cached,
                    seconds=found.seconds,
                )
            case ShoalError() as error:
                return HashAnswer(done=True, num_bytes=0, num_read=0, error=str(error))
        with self._lock:
            return HashAnswer(done=False, num_bytes=self._num_bytes, num_read=self._num_read)

    def _run(self) -> None:
        request = self._request
        try:
            root = self._locate(request.path)
            self._result = hash_tree(
                root,
                also=[os.fsdecode(name) for name in request.also],
                num_jobs=request.num_jobs,
                cache=SumCache(root) if request.use_cache else None,
                stop=self._stop,
                begin=self._begin,
                advance=self._advance,
            )
        except ShoalError as error:
            self._result = error
        except Exception as error:  # the asker must hear of it
            self._result = ModelError(f"{type(error).__name__}: {error}")
        self._done.set()

    def _begin(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes

    def _advance(self, num_bytes: int) -> None:
        with self._lock:
            self._num_read += num_bytes
        if self.is_forgotten():
            self._stop.set()


HASH = Service("verify.hash", HashRequest, HashAnswer, HashJobs().run)
