"""The figures of the offline benchmarks: pure functions from what the program measured to what is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from shoal.benchmark.workload import TokenRequest
from shoal.messages import BenchRun
from shoal.stats import Summary, median


@dataclasses.dataclass(frozen=True)
class LatencyReport:
    """Medians over the runs; milliseconds.

    ms_per_token: of the whole batch, from its first request to its last token, prefill included, by the longest output:
    what other engines' offline latency benchmarks show. first_token: mean over the requests.
    between_tokens: what lies between two tokens of a request, over all requests of all runs; tokens that came together
    share the time since the one before them. None where requests have one token.
    """

    batch_ms: float
    ms_per_token: float
    first_token_ms: float
    between_tokens_ms: Summary | None
    runs_ms: list[float]


@dataclasses.dataclass(frozen=True)
class ThroughputReport:
    """Medians over the runs, which begin with the first request and end with the last token. Total tokens are those
    of the prompts and of the output; prompt tokens per second say something where hardly anything is generated."""

    seconds: float
    num_prompt_tokens: int
    num_output_tokens: int
    prompt_tokens_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    requests_per_second: float
    runs_seconds: list[float]


@dataclasses.dataclass(frozen=True)
class StartupReport:
    """Seconds from the start of a process until its engine takes requests, and the first answer of one token."""

    cold_seconds: float
    again_seconds: float
    cold_first_token_ms: float
    again_first_token_ms: float
    cold_runs: list[float]
    again_runs: list[float]


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of an engine: seconds until it was ready, and until its first request was answered after that."""

    ready_seconds: float
    first_token_seconds: float


def latency_report(requests: Sequence[TokenRequest], runs: Sequence[BenchRun]) -> LatencyReport:
    """runs: at least one, with arrivals."""
    longest = max(request.num_output for request in requests)
    batch_ms = 1e3 * median([run.seconds for run in runs])
    first = [sum(times[0][0] for times in run.arrivals) / len(run.arrivals) for run in runs]
    gaps = [1e3 * gap for run in runs for times in run.arrivals for gap in token_gaps(times)]
    return LatencyReport(
        batch_ms=batch_ms,
        ms_per_token=batch_ms / longest,
        first_token_ms=1e3 * median(first),
        between_tokens_ms=Summary.of(gaps) if gaps else None,
        runs_ms=[1e3 * run.seconds for run in runs],
    )


def throughput_report(requests: Sequence[TokenRequest], runs: Sequence[BenchRun]) -> ThroughputReport:
    """runs: at least one."""
    seconds = median([run.seconds for run in runs])
    num_prompt = sum(len(request.prompt) for request in requests)
    num_output = sum(request.num_output for request in requests)
    return ThroughputReport(
        seconds=seconds,
        num_prompt_tokens=num_prompt,
        num_output_tokens=num_output,
        prompt_tokens_per_second=num_prompt / seconds,
        output_tokens_per_second=num_output / seconds,
        total_tokens_per_second=(num_prompt + num_output) / seconds,
        requests_per_second=len(requests) / seconds,
        runs_seconds=[run.seconds for run in runs],
    )


def startup_report(cold: Sequence[Start], again: Sequence[Start]) -> StartupReport:
    """cold: starts with empty caches; again: the start after each of them."""
    return StartupReport(
        cold_seconds=median([start.ready_seconds for start in cold]),
        again_seconds=median([start.ready_seconds for start in again]),
        cold_first_token_ms=1e3 * median([start.first_token_seconds for start in cold]),
        again_first_token_ms=1e3 * median([start.first_token_seconds for start in again]),
        cold_runs=[start.ready_seconds for start in cold],
        again_runs=[start.ready_seconds for start in again],
    )


def token_gaps(arrivals: Sequence[tuple[float, int]]) -> list[float]:
    """The times between tokens, one for each token after the first arrival's.

    arrivals: (time, number of tokens) in order. Tokens that come together share the time since the arrival before.
    """
    gaps = []
    for (before, _), (now, num_tokens) in zip(arrivals, arrivals[1:], strict=False):
        gaps += [(now - before) / num_tokens] * num_tokens
    return gaps
