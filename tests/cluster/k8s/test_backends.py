"""The file that keeps a router in step with a headless Service."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoal.cluster.k8s.backends import BackendFile, addresses_of, router_file
from shoal.config.router_settings import SettingsSource


def test_the_router_takes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    path.write_text(router_file(["10.0.0.1", "fd00::2"], 8000))
    settings = SettingsSource.of(["--config", str(path)]).load()
    assert [backend.url for backend in settings.backends] == ["http://10.0.0.1:8000", "http://[fd00::2]:8000"]


def test_it_follows_the_name_and_keeps_the_last_servers(tmp_path: Path) -> None:
    answers = [[], ["10.0.0.1"], ["10.0.0.1"], ["10.0.0.1", "10.0.0.2"], [], ["10.0.0.3"]]
    path = tmp_path / "router.yaml"
    file = BackendFile("servers", 8000, path, lambda name, port: answers.pop(0))
    assert not file.refresh() and not path.exists()  # the router is not to start without any
    assert file.refresh() and "10.0.0.1:8000" in path.read_text()
    assert not file.refresh()
    assert file.refresh() and path.read_text().count("http://") == 2
    assert not file.refresh() and path.read_text().count("http://") == 2
    assert file.refresh() and path.read_text() == "backends:\n  - http://10.0.0.3:8000\n"
    assert os.listdir(tmp_path) == ["router.yaml"]


def test_names_that_do_and_do_not_resolve() -> None:
    assert addresses_of("localhost", 80)
    assert addresses_of("no-such-name.invalid", 80) == []


def test_the_program_writes_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    command = [sys.executable, "-m", "shoal.cluster.k8s.backends", "127.0.0.1", "8000", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        assert path.read_text() == "backends:\n  - http://127.0.0.1:8000\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("arguments", [[], ["name", "port", "file"]])
def test_bad_arguments(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shoal.cluster.k8s.backends", *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "usage: python -m shoal.cluster.k8s.backends NAME PORT FILE" in done.stderr
