"""Triton without a GPU and without its interpreter, in a process of its own: the compiler, for a GPU that is not there.

The tests' own process has the interpreter, which kernels choose when they are defined: this is for scripts that tests
start, before they import kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class _Driver(DriverBase):
    """Names a target. What would be launched must not be."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


def compile_only(capability: int, on_compiled: Callable[[str, Any], None]) -> None:
    """From here on launches compile for this capability and do nothing else. on_compiled: a kernel's name, and what
    Triton made of it; told of each launch."""
    driver.set_active(_Driver(capability))
    launch = JITFunction.run

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        on_compiled(kernel.__name__, launch(kernel, *arguments, grid=grid, warmup=True, **options))

    JITFunction.run = run  # type: ignore[method-assign]


def record_variants(variants: set[tuple[str, str]]) -> None:
    """From here on launches enter the variant of their kernel that Triton would compile, and do nothing else."""
    driver.set_active(_Driver(90))

    def enter(kernel: Any, key: str, *_: Any) -> None:
        variants.add((kernel.__name__, key))

    JITFunction._do_compile = enter  # type: ignore[assignment,method-assign]


def run_script(module: str, *arguments: str, **environment: str) -> str:
    """What `python -m module` writes, without the interpreter. Raises if it fails."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**variables, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
        timeout=170,
        check=True,
    )
    return done.stdout
