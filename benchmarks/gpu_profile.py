"""Where the time of a step goes on the GPU: kernels by name, the gaps between them, and what the host did meanwhile.

    python benchmarks/gpu_profile.py lat8b [--steps 20:60] [--set enforce_eager=true] [--host] [--trace FILE]

A preset's row, with the engine core, the scheduler and a single rank's worker in this process as they are in the core's
own; requests come and tokens go without sockets. Of several ranks the first is profiled, in its process. Three runs: to
warm up, timed, and under torch.profiler between two steps. The window begins and ends with an idle GPU. On a CPU the
operators stand for kernels, to try the program.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

# Graphs are seen whole only where CUPTI stays attached from before their capture.
os.environ.setdefault("TEARDOWN_CUPTI", "0")
os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")

import torch

from shoal.benchmark.plan import Plan, Wish, plan
from shoal.benchmark.presets import LATENCY_PRESETS, PRESETS
from shoal.benchmark.workload import Workload, draw_requests
from shoal.cli.bench_options import BENCH_ENGINE_SECTIONS
from shoal.config.engine_config import EngineConfig
from shoal.config.knobs import KnobTable
from shoal.config.resolve import make_engine_config
from shoal.engine.core import EngineCore
from shoal.executor.base import Executor
from shoal.executor.distributed import DistributedExecutor
from shoal.executor.launcher import WorkerLink
from shoal.executor.multiprocess import LocalLauncher
from shoal.executor.uniproc import UniprocExecutor
from shoal.messages import (
    AddRequest,
    BatchResult,
    ClientMessage,
    CoreMessage,
    ScheduledBatch,
    Shutdown,
    WorkerSetup,
)
from shoal.types import EngineRequest, SamplingParams
from shoal.worker.process import OnProgress, Rank, Seat

_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST_WORK = ("cpu_op",)
_SAMPLE_SECONDS = 0.0005
_SMALLEST_GAP_US = 1.5
_NAME_WIDTH = 76
_RANK_PROGRAM = "--rank-program"
_TRACE_SECONDS = 60.0


class Window:
    """Profiles a worker's steps from `first` up to `last`, counted from `open`. At both ends no step is under way."""

    def __init__(self, device: str, first: int, last: int, on_thread: Callable[[Callable[[], None]], None]) -> None:
        """on_thread: does something on the thread that launches work, whose operators are seen on a CPU."""
        self.device, self._first, self._last, self._on_thread = device, first, last, on_thread
        self._step: int | None = None
        self._profile: torch.profiler.profile | None = None
        self.num_steps = 0

    def open(self) -> None:
        self._step = 0

    def before_step(self) -> None:
        if self._step is None:
            return
        if self._step == self._first:
            self._settle()
            self._profile = new_profile(self.device)
            self._on_thread(self._profile.start)
        elif self._step == self._last:
            self.close()
        if self._step is not None:
            self._step += 1

    def close(self) -> None:
        """Also where the run has ended before the window has."""
        if self._step is not None and self._profile is not None:
            self._settle()
            self._on_thread(self._profile.stop)
            self.num_steps = self._step - self._first
        self._step = None

    def export(self, path: Path) -> None:
        """Write the trace, with the number of its steps beside it; nothing if the run was too short."""
        if self._profile is not None and self.num_steps:
            self._profile.export_chrome_trace(str(path))
            path.with_suffix(".steps").write_text(str(self.num_steps))

    def _settle(self) -> None:
        self._on_thread(lambda: None)
        if self.device == "cuda":
            torch.cuda.synchronize()


class Notes(Executor):
    """What both executors note of a run: how large its steps were, and when they ended."""

    ends: list[float]
    sizes: list[tuple[int, int]]  # requests and tokens

    def begin_run(self, is_profiled: bool) -> None:
        self.ends, self.sizes = [], []

    def execute(self, batch: ScheduledBatch) -> None:
        self.sizes.append((len(batch.work), sum(item.num_new_tokens for item in batch.work)))
        super().execute(batch)  # type: ignore[safe-super]

    def sample(self, step_id: int, grammar_masks: dict[int, bytes] | None = None) -> Future[BatchResult]:
        future = super().sample(step_id, grammar_masks)  # type: ignore[safe-super]
        future.add_done_callback(lambda _: self.ends.append(time.perf_counter()))
        return future

    def end_profile(self) -> None:
        """After the profiled run."""


class OneRank(Notes, UniprocExecutor):
    """The worker is here."""

    def __init__(self, config: EngineConfig, window: tuple[int, int], trace: Path) -> None:
        super().__init__(config)
        self._window = Window(config.device, *window, lambda work: self._launch.submit(work).result())
        self._trace = trace

    def begin_run(self, is_profiled: bool) -> None:
        super().begin_run(is_profiled)
        if is_profiled:
            self._window.open()

    def execute(self, batch: ScheduledBatch) -> None:
        self._window.before_step()
        super().execute(batch)

    def end_profile(self) -> None:
        self._window.close()
        self._window.export(self._trace)


class SeveralRanks(Notes, DistributedExecutor):
    """Rank 0 runs this file in place of the worker's program. A file that appears tells it that its run begins."""

    def __init__(self, config: EngineConfig, window: tuple[int, int], trace: Path) -> None:
        super().__init__(config, ProfiledLauncher(config, window, trace))
        self._trace = trace

    def begin_run(self, is_profiled: bool) -> None:
        super().begin_run(is_profiled)
        if is_profiled:
            self._trace.with_suffix(".go").touch()

    def end_profile(self) -> None:
        deadline = time.monotonic() + _TRACE_SECONDS
        while not self._trace.with_suffix(".steps").exists() and time.monotonic() < deadline:
            time.sleep(0.1)


class ProfiledLauncher(LocalLauncher):
    def __init__(self, config: EngineConfig, window: tuple[int, int], trace: Path) -> None:
        super().__init__(config)
        self._arguments = [_RANK_PROGRAM, config.device, *map(str, window), str(trace)]

    def command(self, link: WorkerLink, rank: int) -> list[str]:
        python, _, _, *rest = link.command(rank)  # python -m shoal.worker …
        return link.command(rank) if rank else [python, str(Path(__file__).resolve()), *self._arguments, *rest]


def rank_program(device: str, first: str, last: str, trace: str) -> int:
    """A worker whose steps are profiled. The trace is written as soon as the window ends, within the run."""
    from shoal.worker import __main__ as worker

    def make_rank(setup: WorkerSetup, seat: Seat, on_progress: OnProgress) -> Rank:
        if device == "cuda":
            attach()
        rank = worker._model_rank_maker(None)(setup, seat, on_progress)
        window, execute, go = Window(device, int(first), int(last), lambda work: work()), rank.execute, Path(trace)
        is_open = False

        def execute_profiled(batch: ScheduledBatch) -> None:
            nonlocal is_open
            if not is_open and go.with_suffix(".go").exists():
                is_open = True
                window.open()
            window.before_step()
            if window.num_steps and not go.exists():
                window.export(go)
            execute(batch)

        rank.execute = execute_profiled  # type: ignore[method-assign]
        return rank

    return worker.main(make_rank)


def new_profile(device: str) -> torch.profiler.profile:
    kind = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    return torch.profiler.profile(activities=[kind], acc_events=True)


class Runs:
    """The core's channel: hands it the same requests several times, each run when the one before has ended."""

    def __init__(self, planned: Plan, num_runs: int, on_run: Callable[[int], None]) -> None:
        self._requests = draw_requests(planned.workload, planned.vocab_size, planned.options["seed"])
        self._temperature = planned.workload.temperature
        self._num_runs, self._on_run, self._run = num_runs, on_run, 0
        self._woken = threading.Event()

    def receive(self, block: bool, seconds: float | None = None) -> list[ClientMessage]:
        if not block:
            return []
        self._on_run(self._run)
        self._run += 1
        if self._run > self._num_runs:
            return [Shutdown()]
        return [
            AddRequest(
                EngineRequest(
                    f"{self._run}-{index}",
                    request.prompt,
                    SamplingParams(
                        temperature=self._temperature, max_tokens=request.num_output, ignore_eos=True, seed=index
                    ),
                )
            )
            for index, request in enumerate(self._requests)
        ]

    def wait(self, seconds: float) -> None:
        self._woken.wait(seconds)
        self._woken.clear()

    def wake(self) -> None:
        self._woken.set()

    def send(self, message: CoreMessage) -> None:
        """Nobody listens."""


class HostSampler:
    """Looks at what each thread does, every half millisecond, while it is entered."""

    def __init__(self) -> None:
        self.leaves: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.ours: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.num_samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.num_samples += 1
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                name = names.get(ident, "?")
                if ident == threading.get_ident():
                    continue
                self.leaves[name][_place(frame)] += 1
                seen: set[str] = set()
                while frame is not None:
                    place = _place(frame, with_line=False)
                    if "shoal/" in place and place not in seen:
                        seen.add(place)
                        self.ours[name][place] += 1
                    frame = frame.f_back  # type: ignore[assignment]

    def show(self) -> None:
        print(f"\nhost, {self.num_samples} samples of each thread (share of the timed run)")
        for thread in sorted(self.leaves):
            if not thread.startswith(("worker", "MainThread")):
                continue
            print(f"  {thread}: innermost lines, then our functions with all that they call")
            for counter, count in ((self.leaves[thread], 10), (self.ours[thread], 16)):
                for place, hits in counter.most_common(count):
                    print(f"    {hits / max(self.num_samples, 1):6.1%}  {place}")
                print("    --")


def _place(frame: Any, with_line: bool = True) -> str:
    code = frame.f_code
    file = re.sub(r"^.*/(site-packages|python3\.\d+|dist-packages)/", "", code.co_filename)
    file = file[file.rfind("shoal/") :] if "shoal/" in file else file
    return f"{file}:{frame.f_lineno} {code.co_name}" if with_line else f"{file} {code.co_qualname}"


@dataclasses.dataclass(frozen=True)
class Work:
    """One kernel or copy of the trace, in µs."""

    name: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration


def read_trace(path: Path, kinds: tuple[str, ...]) -> list[Work]:
    events = json.loads(path.read_text())["traceEvents"]
    work = [
        Work(event["name"], float(event["ts"]), float(event["dur"]))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in kinds
    ]
    return sorted(work, key=lambda one: one.start)


def show_work(work: list[Work], num_steps: int, num_top: int) -> None:
    """The tables: by kernel, and gaps by their neighbours."""
    if not work:
        print("the profiler saw no kernels (is CUPTI there?)")
        return
    span = max(one.end for one in work) - work[0].start
    groups: dict[str, list[float]] = collections.defaultdict(list)
    for one in work:
        groups[one.name].append(one.duration)
    total = sum(one.duration for one in work)
    gaps, busy_until = collections.defaultdict(list), work[0]
    idle = 0.0
    for one in work[1:]:
        gap = one.start - busy_until.end
        if gap > 0:
            idle += gap
            if gap > _SMALLEST_GAP_US:
                gaps[short(busy_until.name, 40), short(one.name, 40)].append(gap)
        if one.end > busy_until.end:
            busy_until = one
    print(
        f"{num_steps} steps in {span / 1e3:.2f} ms: {span / num_steps:,.1f} µs a step; "
        f"the GPU busy {(span - idle) / num_steps:,.1f} µs, idle {idle / num_steps:,.1f} µs ({idle / span:.1%}); "
        f"{len(work) / num_steps:.1f} kernels and copies a step"
    )
    print(f"{'a step':>8} {'mean µs':>9} {'min':>8} {'µs/step':>10} {'share':>6}  name")
    ranked = sorted(groups.items(), key=lambda item: -sum(item[1]))
    for name, durations in ranked[:num_top]:
        print(
            f"{len(durations) / num_steps:8.2f} {statistics.fmean(durations):9.2f} {min(durations):8.2f} "
            f"{sum(durations) / num_steps:10.1f} {sum(durations) / total:6.1%}  {short(name)}"
        )
    if len(ranked) > num_top:
        rest = sum(sum(durations) for _, durations in ranked[num_top:])
        print(f"{'':8} {'':9} {'':8} {rest / num_steps:10.1f} {rest / total:6.1%}  {len(ranked) - num_top} others")
    print(f"gaps above {_SMALLEST_GAP_US} µs: a step, mean µs, µs/step, after -> before")
    for (before, after), found in sorted(gaps.items(), key=lambda item: -sum(item[1]))[: max(num_top // 3, 8)]:
        print(
            f"{len(found) / num_steps:8.2f} {statistics.fmean(found):9.2f} {sum(found) / num_steps:10.1f}"
            f"  {before} -> {after}"
        )


def short(name: str, width: int = _NAME_WIDTH) -> str:
    """A kernel's name without namespaces and most of its templates."""
    name = re.sub(r"^void ", "", name)
    name = re.sub(r"at::native::|\(anonymous namespace\)::|cutlass::|std::|c10::|at::", "", name)
    name = re.sub(r"\(.*\)$", "", name)
    return name if len(name) <= width else name[: width - 1] + "…"


def show_steps(title: str, executor: Notes, first: int, last: int) -> None:
    """Milliseconds between the ends of steps, for the window and for the run."""
    ends, sizes = executor.ends, executor.sizes
    gaps = [1e3 * (now - before) for before, now in zip(ends, ends[1:], strict=False)]
    inside = gaps[first:last] or gaps
    if not inside:
        return
    requests = [num for num, _ in sizes[first:last]] or [0]
    tokens = [num for _, num in sizes[first:last]] or [0]
    print(
        f"{title}: {len(sizes)} steps; between ends of steps {first}-{last}: "
        f"median {statistics.median(inside):.3f} ms, mean {statistics.fmean(inside):.3f}, "
        f"min {min(inside):.3f}, max {max(inside):.3f}; "
        f"requests {min(requests)}-{max(requests)}, tokens {min(tokens)}-{max(tokens)}; "
        f"first to last step {ends[-1] - ends[0]:.3f} s"
    )


def profile_row(row: str, arguments: argparse.Namespace) -> None:
    window = arguments.window
    with planned_row(row, arguments) as planned, tempfile.TemporaryDirectory() as directory:
        config, trace = make_engine_config(**planned.options), Path(directory) / "trace.json"
        if config.device == "cuda":
            attach()
            print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        print(f"{planned.title}: {planned.workload}; {' '.join(arguments.set)}")
        executor = (OneRank if config.parallel.world_size == 1 else SeveralRanks)(config, window, trace)
        sampler = HostSampler() if arguments.host else None

        def on_run(index: int) -> None:
            if index:
                show_steps(("warm-up", "timed", "profiled")[index - 1], executor, *window)
            if sampler is not None and index in (1, 2):
                (sampler.start if index == 1 else sampler.stop)()
            if index == 3:
                executor.end_profile()
            executor.begin_run(is_profiled=index == 2)

        started = time.perf_counter()
        core = EngineCore(config, executor, Runs(planned, 3, on_run))
        core.start()
        print(f"ready after {time.perf_counter() - started:.1f} s")
        core.run()
        show_trace(trace, config.device, arguments)
    if sampler is not None:
        sampler.show()


def attach() -> None:
    """CUPTI before the first capture."""
    with new_profile("cuda"):
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()


def show_trace(trace: Path, device: str, arguments: argparse.Namespace) -> None:
    if not trace.exists():
        print(f"the run ended before step {arguments.window[1]}: name others with --steps")
        return
    if arguments.trace:
        shutil.copy(trace, arguments.trace)
    num_steps = int(trace.with_suffix(".steps").read_text())
    show_work(read_trace(trace, _DEVICE_WORK if device == "cuda" else _HOST_WORK), num_steps, arguments.top)


def planned_row(row: str, arguments: argparse.Namespace) -> Any:
    table = KnobTable(BENCH_ENGINE_SECTIONS)
    said = {}
    for text in arguments.set:
        name, _, value = text.partition("=")
        knob = table.find(name, str)
        said[knob.name] = knob.from_text(value, name)
    engine = {name: value for section in table.build(said) for name, value in vars(section).items()}
    return plan(Wish(engine, Workload(1, (8, 8), (1, 1)), row, arguments.scale))


def parse_steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    return int(first), int(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", choices=PRESETS, metavar="ROW", help=", ".join(PRESETS))
    parser.add_argument("--steps", help="first and last step of the window; default 20:60, for batches 40:80")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the engine")
    parser.add_argument("--scale", type=float, default=1.0, help="a smaller model and fewer requests")
    parser.add_argument("--top", type=int, default=30, help="kernels shown")
    parser.add_argument("--host", action="store_true", help="also where the host's threads are, by sampling")
    parser.add_argument("--trace", help="file for the trace, for chrome://tracing or Perfetto")
    if sys.argv[1:2] == [_RANK_PROGRAM]:
        own, sys.argv[1:] = sys.argv[2:6], sys.argv[6:]
        os._exit(rank_program(*own))
    arguments = parser.parse_args()
    for row in arguments.rows:
        steps = arguments.steps or ("20:60" if row in LATENCY_PRESETS else "40:80")
        if row.endswith("prefill8b") and not arguments.steps:
            steps = "2:10"
        arguments.window = parse_steps(steps)
        profile_row(row, arguments)


if __name__ == "__main__":
    main()
