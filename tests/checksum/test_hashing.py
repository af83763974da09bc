"""Sums in parallel, and what the cache may say."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.checksum import SumCache, TreeSums, hash_files, hash_tree, list_files
from shoal.checksum import hashing as module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    root.mkdir()
    for index in range(20):
        (root / f"shard-{index:02}").write_bytes(os.urandom(index * 1000))
    age(root)
    return root


def age(root: Path, seconds: float = 100.0) -> None:
    """Times of long ago, so that a later change shows. Those of the entry cannot be set: see `later`."""
    for path in [root, *root.rglob("*")]:
        os.utime(path, (time.time() - seconds, time.time() - seconds))


def later() -> int:
    """Files of this moment count as settled."""
    return time.time_ns() + 10_000_000_000


def true_sums(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def cached(root: Path, tmp_path: Path, now_ns: Callable[[], int] = later) -> TreeSums:
    return hash_tree(root, cache=SumCache(root, tmp_path / "cache", now_ns=now_ns))


@pytest.mark.parametrize("num_jobs", [None, 1, 7, 50])
def test_sums_are_right_and_sorted(tree: Path, num_jobs: int | None) -> None:
    told: list[int] = []
    totals: list[int] = []
    found = hash_tree(tree, num_jobs=num_jobs, begin=totals.append, advance=told.append)
    assert list(found.sums.items()) == list(true_sums(tree).items())
    assert totals == [sum(told)] == [found.num_bytes] == [190_000]
    assert found.unreadable == {} and found.num_cached == 0


def test_a_file_of_many_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_READ_BYTES", 1000)
    (tmp_path / "big").write_bytes(os.urandom(12_345))
    assert hash_tree(tmp_path).sums == true_sums(tmp_path)


def test_what_cannot_be_read_is_named_and_the_rest_has_sums(tree: Path) -> None:
    listing = list_files(tree)
    expected = true_sums(tree)
    (tree / "shard-03").unlink()
    (tree / "shard-04").unlink()
    (tree / "shard-04").mkdir()
    found = hash_files(listing)
    assert found.unreadable == {"shard-03": "No such file or directory", "shard-04": "Is a directory"}
    assert found.sums == {name: digest for name, digest in expected.items() if name not in found.unreadable}


def test_an_unchanged_file_is_not_read_again(tree: Path, tmp_path: Path) -> None:
    assert cached(tree, tmp_path).num_cached == 0
    again = cached(tree, tmp_path)
    assert again.num_cached == 20 and again.sums == true_sums(tree)
    assert list((tmp_path / "cache").iterdir()) == [SumCache(tree, tmp_path / "cache").path]


@pytest.mark.parametrize("how", ["longer", "same size", "same size and mtime", "another file of the same mtime"])
def test_a_changed_file_is_read_again(tree: Path, tmp_path: Path, how: str) -> None:
    cached(tree, tmp_path)
    path = tree / "shard-07"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    time.sleep(0.02)  # times have ticks
    match how:
        case "longer":
            path.write_bytes(bytes(data) + b"x")
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        case "same size":
            path.write_bytes(data)
        case "same size and mtime":
            path.write_bytes(data)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        case _:
            other = tree.parent / "other"
            other.write_bytes(data)
            os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
            other.replace(path)
    found = cached(tree, tmp_path)
    assert found.num_cached == 19 and found.sums == true_sums(tree)


def test_a_file_written_this_moment_is_not_kept(tree: Path, tmp_path: Path) -> None:
    cached(tree, tmp_path, time.time_ns)
    assert cached(tree, tmp_path).num_cached == 0


def test_entries_of_files_that_are_gone_go(tree: Path, tmp_path: Path) -> None:
    cached(tree, tmp_path)
    size = SumCache(tree, tmp_path / "cache").path.stat().st_size
    for index in range(10):
        (tree / f"shard-{index:02}").unlink()
    assert cached(tree, tmp_path).num_cached == 10
    assert SumCache(tree, tmp_path / "cache").path.stat().st_size < size


def test_a_name_that_is_no_text_is_kept_too(tree: Path, tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tree) + b"/\xff")).write_bytes(b"x")
    cached(tree, tmp_path)
    assert cached(tree, tmp_path).num_cached == 21


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"root": 1, "entries": {}}', b"\xff\xfe"])
def test_a_broken_cache_is_as_none(tree: Path, tmp_path: Path, content: bytes) -> None:
    path = SumCache(tree, tmp_path / "cache").path
    path.parent.mkdir()
    path.write_bytes(content)
    assert cached(tree, tmp_path).sums == true_sums(tree)
    assert cached(tree, tmp_path).num_cached == 20


def test_another_root_under_the_same_name_is_not_believed(tree: Path, tmp_path: Path) -> None:
    cached(tree, tmp_path)
    other = tmp_path / "other"
    (tree).rename(other)
    other_cache = SumCache(other, tmp_path / "cache")
    SumCache(tree, tmp_path / "cache").path.replace(other_cache.path)
    assert cached(other, tmp_path).num_cached == 0


def test_a_cache_that_cannot_be_written_costs_nothing_else(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    assert cached(tree, tmp_path).sums == true_sums(tree)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_READ_BYTES", 1000)
    path = tmp_path / "moving"
    path.write_bytes(bytes(10_000))
    changes = [b"once"]

    def change(num_bytes: int) -> None:
        if num_bytes == 1000 and changes:
            with path.open("r+b") as file:
                file.write(changes.pop())
            os.utime(path, ns=(1, len(changes)))

    assert hash_tree(tmp_path, advance=change).sums == true_sums(tmp_path)  # at rest by the second time
    changes += [bytes([number]) for number in range(50)]
    assert hash_tree(tmp_path, advance=change).unreadable == {"moving": "it changes while it is read"}


def test_the_end_is_at_once_and_what_there_is_is_kept(tree: Path, tmp_path: Path) -> None:
    """As Ctrl-C does it: while a read hangs."""
    os.mkfifo(tmp_path / "pipe")  # opening it hangs until somebody writes
    listing = list_files(tree)
    listing.files["hangs"] = tmp_path / "pipe"
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    began = time.monotonic()
    found = hash_files(listing, num_jobs=2, cache=SumCache(tree, tmp_path / "cache", now_ns=later), stop=stop)
    assert time.monotonic() - began < 5
    assert found.sums == true_sums(tree) and "hangs" not in found.unreadable
    assert cached(tree, tmp_path).num_cached == 20
    os.close(os.open(tmp_path / "pipe", os.O_WRONLY))  # let the thread go
