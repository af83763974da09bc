"""Where kernels are kept, and what happens where nothing can be kept."""

from __future__ import annotations

import json
import logging
import resource
from pathlib import Path

import pytest

from shoal import env
from shoal.kernels.disk_cache import find_compiler_cache


def test_a_directory_that_can_be_written_to_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new" / "kernels"))
    find_compiler_cache()
    assert env.triton_cache_directory() == tmp_path / "new" / "kernels"
    assert list(env.triton_cache_directory().iterdir()) == []


def test_another_one_is_found_where_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    with caplog.at_level(logging.WARNING, "shoal"):
        find_compiler_cache()
    other = env.triton_cache_directory()
    assert other.is_dir() and other != tmp_path / "file" / "kernels"
    assert "Triton cannot keep them in" in caplog.text and "Not a directory" in caplog.text
    other.rmdir()


def test_another_one_is_found_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An empty file still fits: the size of files is limited here."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        with caplog.at_level(logging.WARNING, "shoal"):
            find_compiler_cache()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    other = env.triton_cache_directory()
    assert other != tmp_path and str(tmp_path) in caplog.text and "File too large" in caplog.text
    other.rmdir()


def make_entry(directory: Path, name: str) -> Path:
    """As Triton keeps a kernel."""
    entry = directory / (name * 52)
    entry.mkdir()
    files = {"kernel.json": b'{"shared": 0}', "kernel.cubin": b"\x7fELF\x02", "kernel.ttir": b"module"}
    for file, content in files.items():
        (entry / file).write_bytes(content)
    paths = {file: str(entry / file) for file in files}
    (entry / "__grp__kernel.json").write_text(json.dumps({"child_paths": paths}))
    return entry


def test_damaged_kernels_are_dropped_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    whole, no_list, no_facts, zeros = (make_entry(tmp_path, name) for name in "ABCD")
    (no_list / "__grp__kernel.json").write_bytes(b"")
    (no_facts / "kernel.json").write_bytes(b'{"sha')
    (zeros / "kernel.cubin").write_bytes(bytes(5))
    foreign = tmp_path / "settings"
    foreign.mkdir()
    (foreign / "broken.json").touch()
    with caplog.at_level(logging.WARNING, "shoal"):
        find_compiler_cache()
    assert env.triton_cache_directory() == tmp_path
    assert f"3 compiled kernels in {tmp_path} were damaged" in caplog.text
    names = {entry: sorted(file.name for file in entry.iterdir()) for entry in (whole, no_list, no_facts, zeros)}
    assert names[whole] == ["__grp__kernel.json", "kernel.cubin", "kernel.json", "kernel.ttir"]
    assert names[no_list] == ["kernel.cubin", "kernel.json", "kernel.ttir"]
    assert names[no_facts] == ["kernel.cubin", "kernel.ttir"]
    assert names[zeros] == ["kernel.json", "kernel.ttir"]
    assert (foreign / "broken.json").exists()
    caplog.clear()
    find_compiler_cache()
    assert not caplog.records
