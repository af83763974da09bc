"""SumCache: sums of files that have not changed since they were read, kept on disk. hash_files looks in it.

A file counts as unchanged while its size, times (of contents and of its entry) and inode are the same. What changes on
the disk without the file system, as a medium that decays does, is not seen: read without a cache for that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import msgspec

from shoal import env
from shoal.log import get_logger

# A file that was written to just now may be written to again within the same tick of its times.
_RACY_SECONDS = 2.0

logger = get_logger(__name__)


class _Entry(msgspec.Struct, array_like=True, frozen=True):
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    digest: str


class _CacheFile(msgspec.Struct):
    root: str
    entries: dict[str, _Entry]


@dataclasses.dataclass(frozen=True)
class FileState:
    """What tells a file's contents from its earlier ones without reading them."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> Self:
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    def is_settled(self, now_ns: int) -> bool:
        """Whether a later change must show in the times."""
        return max(self.mtime_ns, self.ctime_ns) + int(_RACY_SECONDS * 1e9) < now_ns


def default_cache_directory() -> Path:
    """In SHOAL_CACHE_DIR, or where Shoal keeps things between runs."""
    return env.cache_directory() / "checksums"


class SumCache:
    """The sums below one directory (or of one file). Threads may share it; nothing is written before `save`."""

    def __init__(self, root: Path, directory: Path | None = None, *, now_ns: Callable[[], int] = time.time_ns) -> None:
        """directory: where caches lie; default: `default_cache_directory`. now_ns: the clock of file times."""
        self._now_ns = now_ns
        self._root = str(root.absolute())
        name = hashlib.sha256(os.fsencode(self._root)).hexdigest()[:32]
        self.path = (directory or default_cache_directory()) / f"{name}.json"
        self._lock = threading.Lock()
        self._old = self._read()
        self._new: dict[str, _Entry] = {}

    def look_up(self, path: Path, state: FileState) -> str | None:
        """The sum of a file that is as it was."""
        key = _key(path)
        entry = self._old.get(key)
        if entry is None or (entry.size, entry.mtime_ns, entry.ctime_ns, entry.inode) != dataclasses.astuple(state):
            return None
        with self._lock:
            self._new[key] = entry
        return entry.digest

    def keep(self, path: Path, state: FileState, digest: str) -> None:
        """state: as it was before and after the file was read."""
        if state.is_settled(self._now_ns()):
            with self._lock:
                self._new[_key(path)] = _Entry(state.size, state.mtime_ns, state.ctime_ns, state.inode, digest)

    def save(self, *, partial: bool = False) -> None:
        """Replace the file on disk by what was looked up and kept; a line in the log where it cannot be written.

        partial: not all files were looked at, so the others' entries stay.
        """
        entries = {**self._old, **self._new} if partial else self._new
        if entries == self._old:
            return
        data = msgspec.json.encode(_CacheFile(os.fsencode(self._root).hex(), entries))
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.name}.")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                os.replace(temporary, self.path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            logger.warning("sums are not kept: %s cannot be written (%s)", self.path, error.strerror or error)

    def _read(self) -> dict[str, _Entry]:
        try:
            found = msgspec.json.decode(self.path.read_bytes(), type=_CacheFile)
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            logger.warning("the cache of sums %s cannot be read (%s); all files are read anew", self.path, error)
            return {}
        return found.entries if found.root == os.fsencode(self._root).hex() else {}


def _key(path: Path) -> str:
    """In JSON, names that are no UTF-8 have to be written in another way."""
    return os.fsencode(path.absolute()).hex() if not _is_text(str(path)) else "/" + str(path.absolute())


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
