"""Where kernels are kept, and what happens where nothing can be kept."""

from __future__ import annotations

import logging
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
