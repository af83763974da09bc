from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from shoal.kernels.compile_ahead import CompileWatch, compile_ahead, is_compiling_ahead, num_threads


@triton.jit
def _add_kernel(x, y, SIZE: tl.constexpr, ADDED: tl.constexpr):
    k = tl.arange(0, SIZE)
    tl.store(y + k, tl.load(x + k) + ADDED)


@triton.jit
def _wrong_kernel(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), no_such_name)  # noqa: F821


def test_a_process_takes_its_part_of_the_cores():
    cores = len(os.sched_getaffinity(0))
    assert num_threads(1) == min(16, cores)
    assert num_threads(1000) == 1


def test_only_inside_and_also_after_an_error():
    assert not is_compiling_ahead()
    with pytest.raises(ValueError), compile_ahead():
        assert is_compiling_ahead()
        raise ValueError
    assert not is_compiling_ahead()


def test_compiling_is_told_before_after_and_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = triton.knobs.runtime
    monkeypatch.setattr(runtime, "jit_cache_hook", None)
    monkeypatch.setattr(runtime, "jit_post_compile_hook", None)
    monkeypatch.setattr(CompileWatch, "_INTERVAL_SECONDS", 0.01)
    times: list[float] = []
    again = threading.Event()

    def tell() -> None:
        times.append(time.monotonic())
        if len(times) >= 4:
            again.set()

    watch = CompileWatch(tell)
    watch.attach()
    kernel = {"key": "a", "fn": SimpleNamespace(name="kernel"), "repr": "", "compile": {}}
    assert not runtime.jit_cache_hook(**kernel), "Triton would not compile it"
    assert len(times) == 1
    assert again.wait(60), "nothing is told while it compiles"
    thread = watch._thread
    assert thread is not None
    runtime.jit_post_compile_hook(**kernel)
    end = time.monotonic()
    thread.join(60)
    assert times[-1] <= end, "told of after it had ended"

    # One that failed, or takes longer than any does, is a standstill like others.
    monkeypatch.setattr(CompileWatch, "_LONGEST_SECONDS", 0.02)
    runtime.jit_cache_hook(**kernel)
    while watch._thread is not None:
        time.sleep(0.01)
    # What is compiled side by side at the start is told of as each begins and ends.
    count = len(times)
    with compile_ahead():
        runtime.jit_cache_hook(**kernel)
        runtime.jit_post_compile_hook(**kernel)
    assert len(times) == count + 2 and watch._thread is None


@pytest.mark.gpu
def test_kernels_are_compiled_and_not_launched():
    x, y = torch.zeros(64, device="cuda"), torch.full((64,), -1.0, device="cuda")
    cache = _add_kernel.device_caches[torch.cuda.current_device()][0]
    with compile_ahead():
        for added in (1, 2, 3):
            _add_kernel[1,](x, y, 64, added)
    assert len(cache) == 3 and (y == -1).all()
    for added in (1, 2, 3):
        _add_kernel[1,](x, y, 64, added)
        assert (y == added).all()
    assert len(cache) == 3, "compiled again"


@pytest.mark.gpu
def test_a_kernel_that_cannot_be_compiled_says_so_when_it_is_launched():
    x = torch.zeros(64, device="cuda")
    with compile_ahead():
        _wrong_kernel[1,](x, 64)
    with pytest.raises(triton.CompilationError):
        _wrong_kernel[1,](x, 64)
