"""The project's own frame: pins, scripts and their bad input."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {_normal(package): version for package, version in pairs}


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-cuda.txt"])
def test_everything_that_is_asked_for_is_pinned(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    packages = {_normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in asked}
    pinned = pins(name)
    assert packages - set(pinned) == set()
    assert all(re.fullmatch(r"[\d.]+", version) for version in pinned.values()), "no local tags such as +cpu"


def test_the_two_combinations():
    cpu, cuda = pins("constraints.txt"), pins("constraints-cuda.txt")
    assert cpu["torch"] == "2.13.0" and cuda["torch"] == "2.11.0"
    assert set(cuda) == set(cpu) and cuda["triton"] == cpu["triton"]


@pytest.fixture
def project(tmp_path):
    """A copy of what scripts/install needs, and a PATH with nothing else on it."""
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    programs = tmp_path / "bin"
    programs.mkdir()
    for program in ("bash", "cat", "dirname", "sed"):
        (programs / program).symlink_to(shutil.which(program))

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(programs), "HOME": os.environ.get("HOME", "/"), **variables}
        return subprocess.run(
            [str(tmp_path / "scripts/install"), *arguments], env=environment, capture_output=True, text=True
        )

    run.programs = programs
    return run


def fake_python(path: Path, version: str) -> None:
    """An interpreter of a version that Shoal does not support: it fails the question, and knows its name."""
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "Python {version}" && exit\nexit 1\n')
    path.chmod(0o755)


def test_without_a_python_that_works(project):
    done = project()
    assert (done.returncode, done.stdout) == (1, "")
    assert "needs Python 3.11 or 3.12; there is no python3." in done.stderr
    fake_python(project.programs / "python3", "3.9.1")
    done = project()
    assert done.returncode == 1 and "python3 here is Python 3.9.1." in done.stderr
    done = project(PYTHON="python3")
    assert done.returncode == 1 and "PYTHON=python3 is no Python 3.11 or 3.12" in done.stderr


def test_bad_arguments_of_install(project):
    done = project("--bogus")
    assert done.returncode == 2 and "unknown option --bogus; there are --dev and --quiet" in done.stderr
    done = project(CONSTRAINTS="missing.txt")
    assert done.returncode == 2 and "there is no file missing.txt" in done.stderr
    assert "Usage: scripts/install" in project("--help").stdout


def test_bench_lists_what_there_is():
    done = subprocess.run([str(ROOT / "scripts/bench"), "no-such"], capture_output=True, text=True)
    assert done.returncode == 2
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert path.stem == "__init__" or f"  {path.stem}\n" in done.stderr
