"""`shoal bench latency`, `throughput` and `startup`: an engine of this machine, measured without a server."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from shoal.benchmark.offline import NewsCallback, run_program
from shoal.benchmark.offline_report import Start, latency_report, startup_report, throughput_report
from shoal.benchmark.plan import Plan, Wish, measure_starts, plan
from shoal.benchmark.workload import TokenRequest, Workload, draw_requests, parse_range
from shoal.cli.bench_options import (
    BENCH_ENGINE_SECTIONS,
    LatencyPresetOptions,
    RepeatOptions,
    RequestOptions,
    ScaleOptions,
    StartupPresetOptions,
    ThroughputPresetOptions,
    WarmupOptions,
)
from shoal.cli.bench_output import check_writable, print_table, summary_row, write_json
from shoal.cli.command import Command
from shoal.errors import ConfigError
from shoal.messages import BenchNews, BenchReady, BenchRun

_LATENCY_DEFAULT = Workload(1, (128, 128), (128, 128))
_THROUGHPUT_DEFAULT = Workload(64, (16, 128), (16, 128))
_STARTUP_DEFAULT = Workload(1, (8, 8), (1, 1))
_PRESETS_NOTE = "A preset needs no download: its weights and prompts are random."


def _latency(*sections: Any) -> int:
    *engine, preset, scale, asked, warmup, repeat = sections
    with plan(_wish(engine, preset.preset, scale.scale, asked, _LATENCY_DEFAULT, repeat)) as planned:
        requests, measured = _measure(planned, warmup.warmup, repeat.repeat, token_times=True)
        if measured is None:
            return 0
        report = latency_report(requests, measured[1])
        rows = [
            ("ms/token", f"{report.ms_per_token:.3f}"),
            ("batch, ms", f"{report.batch_ms:.1f}"),
            ("first token, ms", f"{report.first_token_ms:.1f}"),
        ]
        if report.between_tokens_ms is not None:
            rows.append(("between tokens, ms", summary_row(report.between_tokens_ms)))
        _finish("latency", planned, rows, report, repeat)
    return 0


def _throughput(*sections: Any) -> int:
    *engine, preset, scale, asked, warmup, repeat = sections
    with plan(_wish(engine, preset.preset, scale.scale, asked, _THROUGHPUT_DEFAULT, repeat)) as planned:
        requests, measured = _measure(planned, warmup.warmup, repeat.repeat, token_times=False)
        if measured is None:
            return 0
        report = throughput_report(requests, measured[1])
        rows = [
            ("prompt tok/s", f"{report.prompt_tokens_per_second:,.1f}"),
            ("output tok/s", f"{report.output_tokens_per_second:,.1f}"),
            ("total tok/s", f"{report.total_tokens_per_second:,.1f}"),
            ("requests/s", f"{report.requests_per_second:,.2f}"),
            ("seconds", f"{report.seconds:.2f}"),
            ("tokens in · out", f"{report.num_prompt_tokens:,} · {report.num_output_tokens:,}"),
        ]
        _finish("throughput", planned, rows, report, repeat)
    return 0


def _startup(*sections: Any) -> int:
    *engine, preset, scale, repeat = sections
    wish = _wish(engine, preset.preset, scale.scale, RequestOptions(), _STARTUP_DEFAULT, repeat)
    if wish.engine["nnodes"] > 1:
        raise ConfigError("startup measures the engine of one machine several times; leave out --nnodes")
    with plan(wish) as planned, _status(f"{planned.title}: first start") as show:

        def on_start(name: str, start: Start) -> None:
            show(f"{planned.title}: {name} {start.ready_seconds:.1f} s")

        cold, again = measure_starts(planned.options, planned.vocab_size, repeat.repeat, on_start)
    report = startup_report(cold, again)
    rows = [
        ("cold, seconds to ready", f"{report.cold_seconds:.2f}"),
        ("again, seconds to ready", f"{report.again_seconds:.2f}"),
        ("first token after, ms", f"cold {report.cold_first_token_ms:.0f}, again {report.again_first_token_ms:.0f}"),
    ]
    _finish("startup", planned, rows, report, repeat)
    return 0


def _wish(
    engine: list[Any],
    preset: str | None,
    scale: float,
    asked: RequestOptions,
    default: Workload,
    repeat: RepeatOptions,
) -> Wish:
    if repeat.json:
        check_writable(repeat.json)
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"the engine is not installed ({package} is missing): pip install 'shoal[engine]' brings it; "
                "`shoal bench serve` needs none"
            )
    prompt, output = asked.prompt_tokens, asked.output_tokens
    return Wish(
        engine={name: value for section in engine for name, value in dataclasses.asdict(section).items()},
        default=default,
        preset=preset,
        scale=scale,
        num_requests=asked.requests,
        prompt_tokens=parse_range(prompt, "--prompt-tokens") if prompt else None,
        output_tokens=parse_range(output, "--output-tokens") if output else None,
        temperature=asked.temperature,
    )


def _measure(
    planned: Plan, num_warmups: int, num_runs: int, *, token_times: bool
) -> tuple[list[TokenRequest], tuple[float, list[BenchRun]] | None]:
    requests = draw_requests(planned.workload, planned.vocab_size, planned.options["seed"])
    with _status(f"{planned.title}: starting the engine") as show:
        measured = run_program(
            planned.options,
            requests,
            temperature=planned.workload.temperature,
            num_warmups=num_warmups,
            num_runs=num_runs,
            token_times=token_times,
            on_news=_shower(planned.title, num_warmups + num_runs, show),
        )
    return requests, measured


def _shower(title: str, num_runs: int, show: Callable[[str], None]) -> NewsCallback:
    num_done = 0

    def on_news(news: BenchNews) -> None:
        nonlocal num_done
        if isinstance(news, BenchReady):
            show(f"{title}: run 1 of {num_runs}")
        elif isinstance(news, BenchRun):
            num_done += 1
            show(f"{title}: {num_done} of {num_runs} runs done, the last in {news.seconds:.2f} s")

    return on_news


@contextlib.contextmanager
def _status(text: str) -> Iterator[Callable[[str], None]]:
    """A line on standard error that says how far it is; nothing where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status(text) as status:
        yield status.update


def _finish(kind: str, planned: Plan, rows: list[tuple[str, str]], report: Any, repeat: RepeatOptions) -> None:
    title = planned.title if kind == "startup" else f"{planned.title}: {planned.workload}"
    print_table(f"{title} (median of {repeat.repeat})", rows)
    if repeat.json:
        details = {
            "title": planned.title,
            "workload": dataclasses.asdict(planned.workload),
            "engine": planned.options,
            "result": dataclasses.asdict(report),
        }
        write_json(repeat.json, kind, details)


OFFLINE_COMMANDS = (
    Command(
        name="bench latency",
        description="One batch of requests at a time, without a server: milliseconds per token, and their percentiles. "
        + _PRESETS_NOTE,
        sections=(
            *BENCH_ENGINE_SECTIONS,
            LatencyPresetOptions,
            ScaleOptions,
            RequestOptions,
            WarmupOptions,
            RepeatOptions,
        ),
        run=_latency,
    ),
    Command(
        name="bench throughput",
        description="Many requests at once, without a server: tokens per second. " + _PRESETS_NOTE,
        sections=(
            *BENCH_ENGINE_SECTIONS,
            ThroughputPresetOptions,
            ScaleOptions,
            RequestOptions,
            WarmupOptions,
            RepeatOptions,
        ),  # fmt: skip
        run=_throughput,
    ),
    Command(
        name="bench startup",
        description="Seconds from the start of a process until its engine takes requests: cold, with empty caches of "
        "compiled kernels, and again, with what the first start left there. Files that the system holds in memory "
        "stay there. " + _PRESETS_NOTE,
        sections=(*BENCH_ENGINE_SECTIONS, StartupPresetOptions, ScaleOptions, RepeatOptions),
        run=_startup,
    ),
)
