"""SHA-256 of many files by threads: hashlib lets them compute side by side. Used by `shoal verify` and node daemons."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from shoal.checksum.cache import FileState, SumCache
from shoal.checksum.files import Listing, list_files

_READ_BYTES = 8 << 20
_MOST_JOBS = 16
_WAIT_SECONDS = 0.1
# A file that is being written is read again so often before it counts as unreadable.
_READS = 2


@dataclasses.dataclass(frozen=True)
class TreeSums:
    """Sums by name, and why there is none, by name. num_bytes: of all files; num_cached: files that were not read."""

    sums: dict[str, str]
    unreadable: dict[str, str]
    num_bytes: int
    num_cached: int
    seconds: float


def default_num_jobs() -> int:
    """A thread for each core that this process may use, up to 16: beyond that a disk is the limit."""
    return max(1, min(len(os.sched_getaffinity(0)), _MOST_JOBS))


def hash_tree(
    root: Path,
    *,
    also: Iterable[str] = (),
    num_jobs: int | None = None,
    cache: SumCache | None = None,
    stop: threading.Event | None = None,
    begin: Callable[[int], None] | None = None,
    advance: Callable[[int], None] | None = None,
) -> TreeSums:
    """The sums of all files of a directory, or of one file. See `list_files` and `hash_files`; raises NotFoundError."""
    return hash_files(list_files(root, also), num_jobs=num_jobs, cache=cache, stop=stop, begin=begin, advance=advance)


def hash_files(
    listing: Listing,
    *,
    num_jobs: int | None = None,
    cache: SumCache | None = None,
    stop: threading.Event | None = None,
    begin: Callable[[int], None] | None = None,
    advance: Callable[[int], None] | None = None,
) -> TreeSums:
    """Ends early, with what there is, when `stop` is set; KeyboardInterrupt does not wait for a read that hangs.

    begin: is told the bytes of all files; advance: of bytes that were read, or need not be, by whichever thread it was.
    """
    started = time.monotonic()
    stop = stop or threading.Event()
    unreadable = dict(listing.skipped)
    sizes: dict[str, int] = {}
    for name, path in listing.files.items():
        try:
            sizes[name] = path.stat().st_size
        except OSError as error:
            unreadable[name] = error.strerror or str(error)
    if begin is not None:
        begin(sum(sizes.values()))
    # The largest first: one that comes last would keep a single thread busy while the others are done.
    names = sorted(sizes, key=lambda name: sizes[name], reverse=True)
    work = _Work(names, listing.files, cache, stop, advance or (lambda _: None))
    threads = [
        threading.Thread(target=work.run, name=f"sha256-{index}", daemon=True)
        for index in range(min(num_jobs or default_num_jobs(), len(names)))
    ]
    for thread in threads:
        thread.start()
    try:
        while not stop.is_set() and any(thread.is_alive() for thread in threads):
            # A join without a limit would hold a signal up.
            for thread in threads:
                thread.join(_WAIT_SECONDS)
    except BaseException:
        stop.set()
        raise
    finally:
        if cache is not None:
            cache.save(partial=stop.is_set())
    if work.failure is not None:
        raise work.failure
    sums, failed, num_cached = work.results()
    ordered = {name: sums[name] for name in listing.files if name in sums}
    return TreeSums(ordered, unreadable | failed, sum(sizes.values()), num_cached, time.monotonic() - started)


class _Work:
    """What the threads share."""

    def __init__(
        self,
        names: list[str],
        files: Mapping[str, Path],
        cache: SumCache | None,
        stop: threading.Event,
        advance: Callable[[int], None],
    ) -> None:
        self._files, self._cache, self._stop, self._advance = files, cache, stop, advance
        self._names: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in names:
            self._names.put(name)
        self._lock = threading.Lock()
        self._sums: dict[str, str] = {}
        self._failed: dict[str, str] = {}
        self._num_cached = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        buffer = memoryview(bytearray(_READ_BYTES))
        try:
            while not self._stop.is_set():
                try:
                    name = self._names.get_nowait()
                except queue.Empty:
                    return
                self._take(name, buffer)
        except BaseException as error:  # whoever waits must hear of it
            self.failure = error
            self._stop.set()

    def results(self) -> tuple[dict[str, str], dict[str, str], int]:
        with self._lock:
            return dict(self._sums), dict(self._failed), self._num_cached

    def _take(self, name: str, buffer: memoryview) -> None:
        try:
            digest, cached = self._digest(self._files[name], buffer)
        except OSError as error:
            with self._lock:
                self._failed[name] = error.strerror or str(error)
            return
        with self._lock:
            if digest is None:
                if not self._stop.is_set():
                    self._failed[name] = "it changes while it is read"
                return
            self._sums[name] = digest
            self._num_cached += cached

    def _digest(self, path: Path, buffer: memoryview) -> tuple[str | None, bool]:
        """The sum, and whether it was known; None for a file that keeps changing, or when it was told to stop."""
        for _ in range(_READS):
            with path.open("rb", buffering=0) as file:
                before = FileState.of(os.fstat(file.fileno()))
                known = self._cache.look_up(path, before) if self._cache else None
                if known is not None:
                    self._advance(before.size)
                    return known, True
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                hasher = hashlib.sha256()
                num_read = 0
                while size := file.readinto(buffer):
                    if self._stop.is_set():
                        return None, False
                    hasher.update(buffer[:size])
                    num_read += size
                    self._advance(size)
                after = FileState.of(os.fstat(file.fileno()))
            if before == after:
                digest = hasher.hexdigest()
                if self._cache:
                    self._cache.keep(path, after, digest)
                return digest, False
            self._advance(-num_read)
        return None, False
