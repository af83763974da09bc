"""Runs the program beside `llm` that holds the engine, and hears what it measured. `shoal bench latency` and others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from shoal.benchmark.workload import TokenRequest
from shoal.errors import EngineError
from shoal.messages import BenchFailed, BenchNews, BenchOrder, BenchReady, BenchRequest, BenchRun
from shoal.network.child_program import child_program, error_of, lines_of

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
    decoder = msgspec.json.Decoder(BenchNews)
    started = time.monotonic()
    with child_program(_PROGRAM, order, end_seconds=_END_SECONDS, environment=environment) as process:
        for line in lines_of(process):
            news = decoder.decode(line)
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
