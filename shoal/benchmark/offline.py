"""Runs the program beside `llm` that holds the engine, and hears what it measured. `shoal bench latency` and others."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from shoal import env, errors
from shoal.benchmark.workload import TokenRequest
from shoal.errors import EngineError, ShoalError
from shoal.messages import BenchFailed, BenchNews, BenchOrder, BenchReady, BenchRequest, BenchRun

_PROGRAM = "shoal.llm.bench_program"
_END_SECONDS = 30.0

NewsCallback = Callable[[BenchNews], None]


def run_program(
    options: Mapping[str, Any],
    requests: Sequence[TokenRequest],
    *,
    temperature: float = 0.0,
    num_warmups: int = 0,
    num_runs: int = 1,
    token_times: bool = False,
    environment: Mapping[str, str] | None = None,
    on_news: NewsCallback | None = None,
) -> tuple[float, list[BenchRun]] | None:
    """Start an engine with `options` (those of LLM), and run all requests at once, several times.

    environment: changes to the program's. Returns the seconds from the start of the process until the engine was
    ready, and the runs after the warm-ups; None for a program that served as another machine's ranks.
    Raises what the engine raised, by its kind, and EngineError when the program ended without a word.
    """
    order = BenchOrder(
        options=dict(options),
        requests=[BenchRequest(request.prompt, request.num_output) for request in requests],
        temperature=temperature,
        num_warmups=num_warmups,
        num_runs=num_runs,
        token_times=token_times,
    )
    ready: float | None = None
    runs: list[BenchRun] = []
    started = time.monotonic()
    with _program(order, environment) as process:
        for news in _news_of(process):
            if on_news is not None:
                on_news(news)
            match news:
                case BenchReady(when):
                    ready = when - started
                case BenchFailed(kind, message):
                    raise error_of(kind, message)
                case BenchRun() if not news.is_warmup:
                    runs.append(news)
        code = process.wait()
    if code == 130:
        raise KeyboardInterrupt
    if code != 0:
        raise EngineError(f"the benchmark's engine ended with exit code {code}; its last words stand above")
    return None if ready is None else (ready, runs)


def error_of(kind: str, message: str) -> ShoalError:
    """The error of shoal.errors with that name; EngineError for one that is not there."""
    found = getattr(errors, kind, None)
    is_ours = isinstance(found, type) and issubclass(found, ShoalError)
    return found(message) if is_ours else EngineError(message)  # type: ignore[no-any-return, misc]


@contextlib.contextmanager
def _program(order: BenchOrder, environment: Mapping[str, str] | None) -> Iterator[subprocess.Popen[bytes]]:
    """The running program, which has read the order; it is gone afterwards, whatever happened."""
    process = subprocess.Popen(
        [sys.executable, "-m", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env.subprocess_environment(environment),
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # then its exit code says more
            process.stdin.write(msgspec.json.encode(order) + b"\n")
            process.stdin.flush()
        yield process
    finally:
        # The end of its input ends it, and the engine with it.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _news_of(process: subprocess.Popen[bytes]) -> Iterator[BenchNews]:
    assert process.stdout is not None
    decoder = msgspec.json.Decoder(BenchNews)
    for line in process.stdout:
        yield decoder.decode(line)
