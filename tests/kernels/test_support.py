"""Kernels are used where one could be compiled and launched; elsewhere somebody is told what is missing."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

import tests.kernels.conftest  # noqa: F401  the interpreter, before Triton's own functions are made

pytest.importorskip("triton")

from shoal.kernels import probe, support  # noqa: E402


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    support.has_kernels.cache_clear()
    support._launches.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    yield
    support.has_kernels.cache_clear()
    support._launches.cache_clear()


def test_a_device_that_launches_has_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[int] = []
    monkeypatch.setattr(probe, "launch", lambda: launches.append(1))
    assert support.has_kernels(torch.device("cuda:0")) and support.has_kernels(torch.device("cuda:1"))
    assert len(launches) == 1, "once a process"
    assert not support.has_kernels(torch.device("cpu"))


def test_without_a_compiler_it_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The error is Triton's own: it builds its launchers with a C compiler."""
    from triton.runtime.build import _build

    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(support.sysconfig, "get_path", lambda *_: "/nowhere")
    monkeypatch.setattr(probe, "launch", lambda: _build("launcher", "launcher.c", ".", [], [], [], []))
    with caplog.at_level(logging.WARNING, "shoal"):
        assert not support.has_kernels(torch.device("cuda:0"))
        assert not support.has_kernels(torch.device("cuda:1"))
    (record,) = caplog.records
    message = record.getMessage()
    assert "install a C compiler (gcc or clang) and Python.h (the package python3-dev)" in message
    assert "RuntimeError: Failed to find C compiler" in message


def test_another_error_is_said_as_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def launch() -> None:
        raise OSError("libcuda.so cannot found!\nmore")

    monkeypatch.setattr(support, "_missing", lambda: [])
    monkeypatch.setattr(probe, "launch", launch)
    with caplog.at_level(logging.WARNING, "shoal"):
        assert not support.has_kernels(torch.device("cuda:0"))
    assert "the error is (OSError: libcuda.so cannot found!)" in caplog.text


def test_memory_that_is_full_is_no_lack_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch() -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(probe, "launch", launch)
    with pytest.raises(torch.OutOfMemoryError):
        support.has_kernels(torch.device("cuda:0"))


def test_the_probe_itself() -> None:
    probe.launch("cuda" if torch.cuda.is_available() else "cpu")
