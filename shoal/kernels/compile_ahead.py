"""Compiles the Triton kernels of a piece of work in several threads, before it is done. For the start of a worker.

Compiling is most of a cold start, and a launch waits for its kernel: so work that is done once to warm up is first done
dry, where every kernel that it meets is compiled and none is launched. 28 kernels of linear layers, H100 host of 16
cores: 3.1 s, of which 2.1 s are what holds Python's lock, where one after the other took 9.5 (2026-11).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import torch

from shoal.kernels.support import has_triton
from shoal.log import get_logger

_logger = get_logger(__name__)

_MOST_THREADS = 16
_is_dry: ContextVar[bool] = ContextVar("is_dry", default=False)


def is_compiling_ahead() -> bool:
    """Whether this thread's launches do nothing just now. What measures kernels must not: it launches each that it may
    choose, once, and decides later."""
    return _is_dry.get()


class CompileWatch:
    """Calls `tell` before and after each kernel that Triton compiles, from whatever thread, and every second meanwhile:
    compiling may take long, and is no standstill. Of one that takes longer than _LONGEST_SECONDS nothing more is told,
    nor of one that failed."""

    _INTERVAL_SECONDS = 1.0
    _LONGEST_SECONDS = 120.0

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell
        # Held while something is told: once a compilation has ended nothing is told of it.
        self._lock = threading.Lock()
        self._under_way: dict[Any, float] = {}  # when each began
        self._thread: threading.Thread | None = None

    def attach(self) -> None:
        """Does nothing without Triton."""
        if has_triton():
            import triton

            triton.knobs.runtime.jit_cache_hook = self._begin
            triton.knobs.runtime.jit_post_compile_hook = self._end

    def _begin(self, *, key: Any, fn: Any, **_: Any) -> None:
        """Returns nothing, which has Triton go on."""
        with self._lock:
            self._tell()
            if is_compiling_ahead():  # side by side, at the start, and not each of them has an end of its own
                return
            self._under_way[fn.name, key] = time.monotonic()
            if self._thread is None:
                self._thread = threading.Thread(target=self._tell_meanwhile, name="compile-watch", daemon=True)
                self._thread.start()

    def _end(self, *, key: Any, fn: Any, **_: Any) -> None:
        with self._lock:
            self._under_way.pop((fn.name, key), None)
            self._tell()

    def _tell_meanwhile(self) -> None:
        while True:
            time.sleep(self._INTERVAL_SECONDS)
            with self._lock:
                latest = time.monotonic() - self._LONGEST_SECONDS
                self._under_way = {kernel: begin for kernel, begin in self._under_way.items() if begin > latest}
                if not self._under_way:
                    self._thread = None
                    return
                self._tell()


@contextlib.contextmanager
def compile_ahead(local_size: int = 1) -> Iterator[None]:
    """Inside, launches of this thread compile their kernels in the background and do nothing else, so that tensors hold
    whatever was in their memory: nothing may depend on values, and no graph may be captured. Returns when all is
    compiled. A kernel that cannot be compiled says so when it is launched.

    local_size: processes of this host that do this at the same time, and share its cores. Does nothing where kernels
    are interpreted, or without Triton.
    """
    if not has_triton():
        yield
        return
    import triton

    kernel_class: Any = triton.runtime.JITFunction
    launch = kernel_class.run
    met: set[Any] = set()

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if not is_compiling_ahead():  # another thread
            return launch(kernel, *arguments, grid=grid, warmup=warmup, **options)
        call = (kernel, *map(_kind, arguments), *((name, _kind(value)) for name, value in options.items()))
        if call in met:  # every layer launches the same, and Triton takes half a millisecond to find that out
            return None
        met.add(call)
        return launch(kernel, *arguments, grid=grid, warmup=True, **options)

    begin = time.perf_counter()
    with (
        ThreadPoolExecutor(num_threads(local_size), thread_name_prefix="compile") as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        # Triton's own way to compile without a launch, `kernel.warmup(…)`, would have to be called in place of every
        # launch, with the same arguments.
        kernel_class.run = compile_only
        token = _is_dry.set(True)
        try:
            yield
        finally:
            _is_dry.reset(token)
            kernel_class.run = launch
        met_all = time.perf_counter()
    done = time.perf_counter()
    _logger.debug("%d launches compiled ahead: %.2f s, then waited %.2f s", len(met), met_all - begin, done - met_all)


def _kind(argument: Any) -> Any:
    """What a compiled kernel may depend on: at least that."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return argument if isinstance(argument, (int, str, torch.dtype, type(None))) else repr(argument)


def num_threads(local_size: int) -> int:
    """For each of `local_size` processes: their part of the cores that this one may use."""
    return min(_MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // local_size))
