"""Which files of a directory have sums: its contents, not what tools keep beside them. Links to files are files."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from shoal.errors import NotFoundError

# A repository's own, and what the hub's client writes beside downloads: locks, times, parts.
_LEFT_OUT = (".git", ".locks", ".no_exist")
_LEFT_OUT_PATHS = (".cache/huggingface",)
_LOCK_SUFFIX = ".lock"


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files below `root`, by their name relative to it ("/" between folders), sorted; `skipped`: why not, by name.

    A root that is a file is in it under its own name.
    """

    root: Path
    files: dict[str, Path]
    skipped: dict[str, str]


def list_files(root: Path, also: Iterable[str] = ()) -> Listing:
    """also: names of files that count wherever they lie, if they are there: a list of sums names them.

    Raises NotFoundError when there is nothing at `root`, or it cannot be looked at.
    """
    try:
        found = root.stat()
    except OSError as error:
        raise NotFoundError(f"{root} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISDIR(found.st_mode):
        reason = _why_no_file(found.st_mode)
        files, skipped = ({}, {root.name: reason}) if reason else ({root.name: root}, {})
        return Listing(root, files, skipped)
    files = {}
    skipped = {}
    _walk(root, "", [(found.st_dev, found.st_ino)], files, skipped)
    for name in also:
        if name not in files and name not in skipped and (root / name).is_file():
            files[name] = root / name
    # As in the C locale: by bytes.
    return Listing(root, dict(sorted(files.items(), key=lambda item: os.fsencode(item[0]))), skipped)


def _walk(
    folder: Path, prefix: str, above: list[tuple[int, int]], files: dict[str, Path], skipped: dict[str, str]
) -> None:
    """above: device and inode of the folder and all over it, since links may lead back up."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        skipped[prefix.rstrip("/") or "."] = error.strerror or str(error)
        return
    # In the hub's cache the files of blobs/ are those that snapshots/ names by links.
    is_hub_cache = {"blobs", "snapshots"} <= {entry.name for entry in entries}
    for entry in entries:
        name = prefix + entry.name
        if _is_left_out(name, entry.name) or (is_hub_cache and entry.name == "blobs"):
            continue
        try:
            found = entry.stat()
        except OSError as error:
            skipped[name] = _why_not(Path(entry.path), error)
            continue
        if stat.S_ISDIR(found.st_mode):
            identity = (found.st_dev, found.st_ino)
            if identity in above:
                skipped[name] = f"a link to a folder that it lies in ({os.readlink(entry.path)})"
            else:
                _walk(Path(entry.path), name + "/", [*above, identity], files, skipped)
        elif reason := _why_no_file(found.st_mode):
            skipped[name] = reason
        else:
            files[name] = Path(entry.path)


def _is_left_out(name: str, last: str) -> bool:
    return (
        last in _LEFT_OUT
        or last.endswith(_LOCK_SUFFIX)
        or any(name == path or name.endswith(f"/{path}") for path in _LEFT_OUT_PATHS)
    )


def _why_no_file(mode: int) -> str:
    kinds = (
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISCHR, "a device"),
    )
    return next((f"{kind}, not a file" for is_kind, kind in kinds if is_kind(mode)), "")


def _why_not(path: Path, error: OSError) -> str:
    if path.is_symlink():
        return f"a link to {os.readlink(path)}, which cannot be read: {error.strerror or error}"
    return error.strerror or str(error)
