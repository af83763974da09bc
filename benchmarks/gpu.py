"""The table of speed on GPUs: all rows that fit the GPUs here, one after the other, beside vLLM's figures.

    python benchmarks/gpu.py [--rows lat8b,batch8b] [--runs 3] [--json FILE] [-- --enforce-eager …]
    python benchmarks/gpu.py --profile lat8b [-- --host …]     where a step's time goes (benchmarks/gpu_profile.py)

Each row is `shoal bench`, a process of its own with a time limit; one that fails is said in the table. Offline, random
weights and token ids, end tokens ignored, no prefix caching, medians after one warm-up run. ms/token is the time from
the request to its last token, prompt included, by output tokens; tok/s counts from the first request to the last token.

vLLM 0.25.1 was measured the same way on H200s (4.3 TB/s, 790 TFLOP/s). Another card's ratio to it says little; the
shares of each card's own limit can be compared. A limit counts weight bytes (head included, embedding not) over
this card's copy bandwidth, or for prefill the multiplications of layers and causal attention over its bf16 rate.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shoal.benchmark.presets import PRESETS, Preset, Shape
from shoal.version import __version__

_REFERENCE_BANDWIDTH, _REFERENCE_RATE = 4.3e12, 790e12  # an H200's, bytes/s and FLOP/s
_CARD_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. vllm: its figure on H200s. target: ours, there; None: vLLM's own figure.

    unit: "ms/token", "output tok/s", "prompt tok/s"; the last two are better when higher. seconds: its time limit.
    """

    name: str
    unit: str
    vllm: float
    target: float | None = None
    seconds: float = 300.0

    @property
    def preset(self) -> Preset:
        return PRESETS[self.name]

    @property
    def num_gpus(self) -> int:
        return self.preset.tensor_parallel_size

    def advantage(self, ours: float) -> float:
        """How many times as fast as vLLM."""
        return self.vllm / ours if self.unit == "ms/token" else ours / self.vllm

    def limit(self, bandwidth: float, rate: float) -> float | None:
        """The figure that the hardware allows; None for what is bound by many things."""
        shape = self.preset.shape
        if self.unit == "ms/token":
            num_bytes = bytes_per_weight(shape) * layer_weights(shape) + 2 * head_weights(shape)
            return 1e3 * num_bytes / bandwidth / self.num_gpus
        if self.unit == "prompt tok/s":
            num_tokens = self.preset.workload.prompt_tokens[1]
            attention = 2 * shape.num_layers * shape.num_heads * shape.head_dim * num_tokens  # 4 x half the square
            return rate * self.num_gpus / (2 * layer_weights(shape) + attention)
        return None

    def share(self, figure: float, bandwidth: float, rate: float) -> str:
        """Of the limit, in percent."""
        limit = self.limit(bandwidth, rate)
        if limit is None:
            return "–"
        return f"{limit / figure if self.unit == 'ms/token' else figure / limit:.0%}"


def layer_weights(shape: Shape) -> int:
    """Elements of all layers' matrices."""
    attention = shape.hidden_size * shape.head_dim * 2 * (shape.num_heads + shape.num_kv_heads)
    return shape.num_layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)


def bytes_per_weight(shape: Shape) -> float:
    """Of the layers; with scales in 16 bits where groups of weights have one."""
    config = shape.more.get("quantization_config")
    return 2 if config is None else config["bits"] / 8 + 2 / config["group_size"]


def head_weights(shape: Shape) -> int:
    return shape.hidden_size * shape.vocab_size


ROWS = {
    row.name: row
    for row in (
        Row("small1", "ms/token", 1.80, 1.2),
        Row("lat8b", "ms/token", 4.90, 4.4),
        Row("nano", "output tok/s", 22300, 23500, seconds=420),
        Row("batch8b", "output tok/s", 9250, 9500, seconds=420),
        Row("prefill8b", "prompt tok/s", 40600),
        Row("det-lat8b", "ms/token", 18.7, 7),
        Row("det-batch8b", "output tok/s", 6060, 7500, seconds=420),
        Row("det-prefill8b", "prompt tok/s", 32900),
        Row("gptq1", "ms/token", 18.7, 7),
        Row("gptq64", "output tok/s", 2200, 2400, seconds=420),
        Row("lat8b-tp2", "ms/token", 3.52, 3.2),
        Row("batch8b-tp2", "output tok/s", 14500, 15000, seconds=420),
        Row("lat70b", "ms/token", 12.45, 11, seconds=480),
        Row("batch70b", "output tok/s", 2510, 2600, seconds=480),
    )
}
STARTUP = "startup8b"
_STARTUP_VLLM = {"cold": "65–90", "again": "27–45"}
_STARTUP_TARGET = {"cold": 45, "again": 20}
_STARTUP_SECONDS = 400.0


@dataclasses.dataclass
class Outcome:
    """What one row gave: figures of its runs in the row's unit, or why there are none."""

    figures: list[float] = dataclasses.field(default_factory=list)
    failure: str | None = None
    seconds: float = 0.0
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.figures)


def run_bench(kind: str, arguments: list[str], limit: float) -> Outcome:
    """`shoal bench KIND` with `--json`; its whole process group is ended when its time is over."""
    with tempfile.TemporaryDirectory(prefix="shoal-gpu-") as directory:
        file, log = Path(directory) / "figures.json", Path(directory) / "log"
        command = [sys.executable, "-m", "shoal.cli", "bench", kind, *arguments, "--json", str(file)]
        started = time.monotonic()
        with log.open("wb") as output:
            code = run_group(command, limit, output)
        outcome = Outcome(seconds=time.monotonic() - started)
        if code == 0 and file.exists():
            outcome.details = json.loads(file.read_text(encoding="utf-8"))
        else:
            last = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            how = f"not done in {limit:.0f} s" if code is None else f"exit code {code}"
            outcome.failure = f"{how}: {last[-1][:300] if last else 'it said nothing'}"
            print("\n".join(last[-40:]), file=sys.stderr)
    return outcome


def run_group(command: list[str], limit: float | None, output: Any = None) -> int | None:
    """The exit code; None when it had to be ended."""
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT if output else None, process_group=0)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def measure(row: Row, num_runs: int, more: list[str]) -> Outcome:
    kind = "latency" if row.unit == "ms/token" else "throughput"
    outcome = run_bench(kind, ["--preset", row.name, "--repeat", str(num_runs), *more], row.seconds)
    if outcome.failure is None:
        result = outcome.details["result"]
        if kind == "latency":
            outcome.figures = [ms / row.preset.workload.output_tokens[1] for ms in result["runs_ms"]]
        else:
            of = "num_output_tokens" if row.unit == "output tok/s" else "num_prompt_tokens"
            outcome.figures = [result[of] / seconds for seconds in result["runs_seconds"]]
    return outcome


def measure_startup(more: list[str]) -> dict[str, Outcome]:
    """One cold start and one after it."""
    whole = run_bench("startup", ["--preset", "lat8b", "--repeat", "1", *more], _STARTUP_SECONDS)
    outcomes = {}
    for name in ("cold", "again"):
        outcomes[name] = dataclasses.replace(whole, figures=[])
        if whole.failure is None:
            outcomes[name].figures = list(whole.details["result"][f"{name}_runs"])
    return outcomes


# --- the card --------------------------------------------------------------------------------------------------------


def measure_card() -> dict[str, Any]:
    """Names, versions, copy bandwidth (bytes read and written, B/s) and bf16 rate (FLOP/s) of the first GPU."""
    import torch
    import transformers

    if not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} finds no GPU; the rows run on a CPU with shoal bench … --scale 0.1"
        )
    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda").fill_(1)
    destination, size = torch.empty_like(source), 8192
    copy = fastest(lambda: destination.copy_(source), 20)
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    multiply = fastest(lambda: left @ right, 20)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "name": torch.cuda.get_device_name(),
        "count": torch.cuda.device_count(),
        "bandwidth": 2 * 4 * (1 << 30) / copy,
        "rate": 2 * size**3 / multiply,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "transformers": transformers.__version__,
    }


def fastest(work: Any, num_runs: int) -> float:
    """Seconds of the median run, by the GPU's own clock."""
    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_runs + 1)]
    for _ in range(3):
        work()
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)) / 1e3


def card() -> dict[str, Any]:
    """`measure_card` in a process of its own, which leaves nothing on the GPU."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--card"], stdout=subprocess.PIPE, timeout=_CARD_SECONDS, check=True
        )
    except subprocess.CalledProcessError as error:  # it has said why
        raise SystemExit(error.returncode) from None
    except subprocess.TimeoutExpired:
        raise SystemExit(f"the GPU was not measured within {_CARD_SECONDS:.0f} s") from None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- the table -------------------------------------------------------------------------------------------------------


def show(value: float, unit: str) -> str:
    return f"{value:,.0f}" if unit.endswith("tok/s") else f"{value:.2f}"


def table_line(row: Row, outcome: Outcome, gpu: dict[str, Any]) -> str:
    workload = row.preset.workload
    name = f"{row.name} | {row.preset.shape.name}{f', TP={row.num_gpus}' if row.num_gpus > 1 else ''} | {workload}"
    target = show(row.target or row.vllm, row.unit)
    theirs = f"{show(row.vllm, row.unit)} {row.unit} | {target}"
    if outcome.failure is not None:
        return f"| {name} | {theirs} | failed: {outcome.failure.replace('|', '/')} | – | – |"
    ours = f"**{show(outcome.median, row.unit)}** ({show(min(outcome.figures), row.unit)}–"
    ours += f"{show(max(outcome.figures), row.unit)})"
    share = row.share(outcome.median, gpu["bandwidth"], gpu["rate"])
    share += f" ({row.share(row.vllm, _REFERENCE_BANDWIDTH, _REFERENCE_RATE)})" if share != "–" else ""
    return f"| {name} | {theirs} | {ours} | {row.advantage(outcome.median):.2f} | {share} |"


def startup_line(name: str, outcome: Outcome) -> str:
    words = {"cold": "empty caches", "again": "warm caches"}[name]
    head = f"| start-up, {words} | Llama-3.1-8B | until requests are taken | {_STARTUP_VLLM[name]} s"
    ours = f"**{outcome.median:.1f} s**" if outcome.failure is None else f"failed: {outcome.failure.replace('|', '/')}"
    return f"{head} | {_STARTUP_TARGET[name]} s | {ours} | – | – |"


def header(gpu: dict[str, Any], num_runs: int) -> str:
    return (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, Shoal {__version__}, {gpu['count']} × {gpu['name']} "
        f"(copy bandwidth {gpu['bandwidth'] / 1e12:.2f} TB/s, bf16 {gpu['rate'] / 1e12:,.0f} TFLOP/s, measured in this "
        f"run), torch {gpu['torch']} (CUDA {gpu['cuda']}), Triton {gpu['triton']}. Median of {num_runs} runs after one "
        "to warm up (lowest–highest).\n\n"
        "| row | shape | requests · prompt · output | vLLM 0.25.1 on H200 | target | Shoal | times vLLM's | share of "
        "the limit (vLLM's of an H200's) |\n|---|---|---|---|---|---|---|---|"
    )


def parse_rows(text: str | None) -> list[str]:
    known = [*ROWS, STARTUP]
    names = text.split(",") if text else known
    for name in names:
        if name not in known:
            raise SystemExit(f"{name} is not a row; there are {', '.join(known)}")
    return names


def run_rows(names: list[str], arguments: argparse.Namespace, gpu: dict[str, Any]) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    lines: list[str] = []
    for name in names:
        if name == STARTUP:
            for kind, outcome in measure_startup(arguments.more).items():
                outcomes[f"{STARTUP}-{kind}"] = outcome
                lines.append(startup_line(kind, outcome))
        else:
            outcomes[name] = measure(ROWS[name], arguments.runs, arguments.more)
            lines.append(table_line(ROWS[name], outcomes[name], gpu))
        print(f"{name}: {lines[-1]}", file=sys.stderr, flush=True)
    print(header(gpu, arguments.runs))
    print("\n".join(lines))
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help=f"some of {','.join([*ROWS, STARTUP])}; default: all that fit the GPUs")
    parser.add_argument("--runs", type=int, default=3, help="runs of each row, after one to warm up")
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--profile", metavar="ROW", help="where the time of a row's step goes, instead of the table")
    parser.add_argument("--card", action="store_true", help="measure the card only")
    parser.add_argument("more", nargs="*", help="after --: options of the engine for every row, or of the profile")
    arguments = parser.parse_args()
    if arguments.card:
        print(json.dumps(measure_card()))
        return 0
    if arguments.profile:
        program = Path(__file__).with_name("gpu_profile.py")
        return run_group([sys.executable, str(program), arguments.profile, *arguments.more], None) or 0
    names, gpu = parse_rows(arguments.rows), card()
    fitting = [name for name in names if name == STARTUP or ROWS[name].num_gpus <= gpu["count"]]
    outcomes = run_rows(fitting, arguments, gpu)
    left = [f"{name} ({ROWS[name].num_gpus} GPUs)" for name in names if name not in fitting]
    if left:
        print(f"\nNot run here: {', '.join(left)}.")
    if arguments.json:
        figures = {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()}
        Path(arguments.json).write_text(json.dumps({"gpu": gpu, "rows": figures}, indent=2), encoding="utf-8")
    return int(any(outcome.failure for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
