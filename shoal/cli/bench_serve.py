"""`shoal bench serve`: load for any server with an OpenAI API, and what its clients saw of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import signal
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shoal import env
from shoal.benchmark.datasets import RandomPrompts, ServeRequest, read_requests, take
from shoal.benchmark.load import LoadRun, Pace, Target, run_on_loop
from shoal.benchmark.record import RequestRecord
from shoal.benchmark.serve_report import ServeReport, Slo, serve_report
from shoal.benchmark.workload import parse_range
from shoal.cli.api_client import ApiClient
from shoal.cli.bench_options import BenchDataOptions, BenchLoadOptions
from shoal.cli.bench_output import check_writable, print_table, summary_row, write_json
from shoal.cli.client_options import ConnectionOptions
from shoal.cli.command import Command
from shoal.errors import ConfigError, EngineError

_DEFAULT_CONCURRENCY = 16
_BUSY_SHARE = 0.8


def _run(connection: ConnectionOptions, data: BenchDataOptions, load: BenchLoadOptions) -> int:
    requests = _requests(data, load.seed)
    slo = Slo.parse(load.slo) if load.slo else None
    if load.json:
        check_writable(load.json)
    pace = _pace(load)
    target = _target(connection, data, load)
    run_on_loop(_warm_up(target, requests, load.warmup))
    run, interrupted = run_on_loop(_measure(target, requests, pace))
    report = serve_report(run.records, slo)
    rows = _rows(report, len(requests), pace, slo)
    if run.cpu_share > _BUSY_SHARE:
        rows.append(
            (
                "caution",
                f"this program used {run.cpu_share:.0%} of a core: the times may be its own; start several of it",
            )
        )
    print_table(f"{target.model} at {target.url}", rows)
    if load.json:
        details = {
            "url": target.url,
            "model": target.model,
            "data": dataclasses.asdict(data),
            "load": dataclasses.asdict(load),
            "interrupted": interrupted,
            "client_cpu_share": run.cpu_share,
            "result": dataclasses.asdict(report),
        }
        write_json(load.json, "serve", details)
    if interrupted:
        return 130
    return 0 if report.num_succeeded else 1


def _requests(data: BenchDataOptions, seed: int) -> list[ServeRequest]:
    if (data.dataset == "file") != (data.file is not None):
        raise ConfigError("--dataset file and --file FILE go together")
    if data.file is not None:
        output = parse_range(data.output_tokens, "--output-tokens") if data.output_tokens else None
        if output is not None and output[0] != output[1]:
            raise ConfigError("--output-tokens is one number for all requests of a file, or max_tokens in its lines")
        return take(read_requests(data.file, output and output[0]), data.requests)
    shared = data.dataset == "shared-prefix"
    if data.endpoint == "chat" and data.prompt_kind == "ids":
        raise ConfigError("--endpoint chat takes text; add --prompt-kind text")
    prompts = RandomPrompts(
        prompt_tokens=parse_range(data.prompt_tokens, "--prompt-tokens"),
        output_tokens=parse_range(data.output_tokens or "128", "--output-tokens"),
        as_text=data.prompt_kind == "text",
        vocab_size=data.vocab_size,
        num_prefixes=data.num_prefixes if shared else 0,
        prefix_tokens=data.prefix_tokens if shared else 0,
    )
    return prompts.draw(data.requests or 100, seed)


def _pace(load: BenchLoadOptions) -> Pace:
    if load.request_rate is not None and not load.request_rate > 0:  # no number is not above 0 either
        raise ConfigError(f"--request-rate must be above 0 requests a second; got {load.request_rate:g}")
    concurrency = load.concurrency
    if concurrency is None and load.request_rate is None:
        concurrency = _DEFAULT_CONCURRENCY
    return Pace(load.request_rate, concurrency, load.seed)


def _target(connection: ConnectionOptions, data: BenchDataOptions, load: BenchLoadOptions) -> Target:
    """Raises UnavailableError when nobody listens there, before anything is measured."""
    fields: dict[str, Any] = {"temperature": load.temperature}
    if load.ignore_eos:
        fields["ignore_eos"] = True
    fields |= _json_object(load.extra_body)
    api_key = connection.api_key or env.api_key()
    with ApiClient(connection.url, api_key) as client:
        model = connection.model_name or client.models()[0]
        return Target(
            client.url, model, api_key, fields, data.endpoint == "chat", load.continuous_usage, load.request_timeout
        )


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f'--extra-body must be a JSON object, such as {{"top_p": 0.9}}; got {text!r}')
    return found


async def _warm_up(target: Target, requests: list[ServeRequest], num_requests: int) -> None:
    """Send the first of them and forget the times. Raises EngineError where none is answered."""
    run = LoadRun(target, take(requests, num_requests) if num_requests else [], Pace(), lambda _: None)
    await run.run()
    if run.records and not any(record.succeeded for record in run.records):
        first = run.records[0]
        raise EngineError(
            f"the warm-up got no answer ({first.error}: {first.message}); --warmup 0 measures all the same"
        )


async def _measure(target: Target, requests: list[ServeRequest], pace: Pace) -> tuple[LoadRun, bool]:
    """The run, and whether Ctrl-C or SIGTERM ended it early."""
    interrupted = False
    with _Bar(len(requests)) as bar:
        run = LoadRun(target, requests, pace, bar.add)

        def interrupt() -> None:
            nonlocal interrupted
            interrupted = True
            run.stop()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt)
        await run.run()
    return run, interrupted


class _Bar(contextlib.AbstractContextManager["_Bar"]):
    """Requests that have ended, on standard error; nothing where that is no terminal."""

    def __init__(self, num_requests: int) -> None:
        self._bar = Progress(
            TextColumn("Requests"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failed]}"),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("Requests", total=num_requests, failed="")
        self._num_failed = 0

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, record: RequestRecord) -> None:
        self._num_failed += record.error is not None
        self._bar.update(self._task, advance=1, failed=f"{self._num_failed} failed" if self._num_failed else "")


def _rows(report: ServeReport, num_requests: int, pace: Pace, slo: Slo | None) -> list[tuple[str, str]]:
    asked = [f"{pace.rate:g}/s"] if pace.rate else []
    asked += [f"at most {pace.concurrency} at a time"] if pace.concurrency else []
    rows = [
        ("requests", f"{report.num_succeeded} answered of {num_requests}; {', '.join(asked)}"),
        ("seconds", f"{report.seconds:.2f}"),
        ("requests/s", f"{report.requests_per_second:,.2f}"),
        ("output tok/s", f"{report.output_tokens_per_second:,.1f}"),
        ("total tok/s", f"{report.total_tokens_per_second:,.1f}"),
        ("tokens in · out", f"{report.num_prompt_tokens:,} · {report.num_output_tokens:,}"),
        ("most at a time", str(report.peak_concurrency)),
    ]
    series = (
        ("first token, ms", report.ttft_ms),
        ("between tokens, ms", report.itl_ms),
        ("between chunks, ms", report.chunk_gap_ms),
        ("whole answer, ms", report.e2e_ms),
    )
    rows += [(name, summary_row(summary)) for name, summary in series if summary is not None]
    if pace.rate and report.start_delay_p99_ms is not None:
        rows.append(("sent late by, ms", f"p99 {report.start_delay_p99_ms:.2f}"))
    if slo is not None and report.goodput is not None:
        rows.append(("goodput, requests/s", f"{report.goodput:,.2f} ({report.num_good} kept the SLO)"))
    if report.num_uncounted:
        rows.append(("without usage", f"{report.num_uncounted} answers: their chunks are counted as tokens"))
    if report.num_unfinished:
        rows.append(("unfinished", str(report.num_unfinished)))
    for kind, count in report.errors.items():
        rows.append((f"failed: {kind}", f"{count}; {report.error_examples[kind]}"))
    return rows


SERVE_COMMAND = Command(
    name="bench serve",
    description="Send requests to a server with an OpenAI API and show what its clients saw: time to the first token, "
    "between tokens, of whole answers, tokens per second, errors, and requests that kept an SLO. Ctrl-C shows what "
    "was measured so far.",
    sections=(ConnectionOptions, BenchDataOptions, BenchLoadOptions),
    run=_run,
)
