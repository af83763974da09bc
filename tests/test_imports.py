"""The import contract at run time: import-linter cannot see what other packages drag in."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shoal

ROOT = Path(shoal.__file__).parent
# As in pyproject.toml, contracts "torch-free" and "client-side".
WITHOUT_TORCH = (
    "errors", "version", "env", "types", "stats", "log", "messages", "protocol", "checksum", "config", "network",
    "scheduling", "observability", "benchmark", "router", "cluster", "server", "llm", "cli", "engine.async_engine",
    "engine.client",
)  # fmt: skip


def modules_of(name: str) -> list[str]:
    path = ROOT / name.replace(".", "/")
    below = (
        [] if not path.is_dir() else [module.name for module in pkgutil.walk_packages([str(path)], f"shoal.{name}.")]
    )
    return [f"shoal.{name}", *(module for module in below if not module.endswith("__main__"))]


def loaded_after(imports: list[str], watched: tuple[str, ...]) -> list[str]:
    script = "\n".join(f"import {name}" for name in imports)
    script += f"\nimport sys\nprint([name for name in {watched!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return eval(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_no_torch_comes_along(name):
    assert loaded_after(modules_of(name), ("torch", "ray")) == []


def test_the_package_itself_costs_nothing():
    assert loaded_after(["shoal"], ("torch", "transformers", "msgspec", "pydantic", "shoal.llm")) == []


def test_ray_is_imported_in_its_homes_only():
    importers = {
        path.relative_to(ROOT)
        for path in ROOT.rglob("*.py")
        if re.search(r"^\s*(import ray|from ray)\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    homes = {path for path in importers if path.match("executor/ray*.py") or path.parts[0] == "cluster"}
    assert importers == homes and importers


def test_names_of_the_package_are_loaded_when_asked_for():
    script = "from shoal import SamplingParams, __version__; import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Lmm'"):
        _ = shoal.Lmm
