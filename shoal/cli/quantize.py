"""`shoal quantize MODEL OUT --method …`: a quantized checkpoint from a plain one. The work is done by a program beside
it (shoal.quantize), which loads torch; this command checks, starts it and shows how far it is."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from shoal.cli.bench_output import check_writable
from shoal.cli.command import Command
from shoal.cli.quantize_options import CalibrationOptions, GridOptions, QuantizeOptions
from shoal.config.model_path import resolve_model_path
from shoal.errors import ConfigError, EngineError
from shoal.network.child_program import child_program, error_of, lines_of
from shoal.quantize.order import (
    CALIBRATED,
    METHODS,
    MatrixRow,
    QuantizeDone,
    QuantizeFailed,
    QuantizeLayer,
    QuantizeNews,
    QuantizeNote,
    QuantizeOrder,
    QuantizeProgress,
)
from shoal.quantize.output import REPORT, held_output, prepare_output
from shoal.quantize.source import SourceCheckpoint, read_source

_FILE_WIDTH = 120
_END_SECONDS = 10.0
# Of a weight, the usual first.
_BITS = {"gptq": (4, 8), "awq": (4,), "fp8": (8,), "int8": (8,)}
_GROUP_SIZE = 128


class QuantizeCommand(Command):
    """OUT is the second bare argument."""

    def parse(self, arguments: Any) -> list[Any]:
        return super().parse(_with_out_named(list(arguments)))

    def usage(self) -> str:
        return "usage: shoal quantize MODEL OUT --method METHOD [options]"


def _with_out_named(arguments: list[str]) -> list[str]:
    """MODEL OUT … -> MODEL --out OUT …; options between or before them must name both."""
    if len(arguments) > 1 and not arguments[0].startswith("-") and not arguments[1].startswith("-"):
        return [arguments[0], "--out", *arguments[1:]]
    return arguments


def _run(options: QuantizeOptions, calibration: CalibrationOptions, grid: GridOptions) -> int:
    order = _order(options, calibration, grid)
    if options.json is not None:
        check_writable(options.json)
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{package} is missing: pip install 'shoal[engine]' brings it")
    source = read_source(Path(order.model))
    started = time.monotonic()
    with held_output(Path(order.out)):
        rows, done = _quantize(order, source, options.overwrite)
    _print_table(order, rows)
    print(
        f"{order.out}: {done.bytes_before / 1e6:,.1f} MB became {done.bytes_after / 1e6:,.1f} MB in "
        f"{time.monotonic() - started:.0f} s; {REPORT} has these figures"
    )
    if options.json is not None:
        shutil.copyfile(Path(order.out) / REPORT, Path(options.json).expanduser())
    return 0


def _quantize(order: QuantizeOrder, source: SourceCheckpoint, overwrite: bool) -> tuple[list[MatrixRow], QuantizeDone]:
    state = prepare_output(order, source, overwrite)
    console = Console(stderr=True)
    if state.rows:
        console.print(f"{order.out}: {len(state.rows)} layers are done; going on after them", highlight=False)
    rows: list[MatrixRow] = []
    done: QuantizeDone | None = None
    decoder = msgspec.json.Decoder(QuantizeNews)
    with _progress(console) as progress, child_program("shoal.quantize", order, end_seconds=_END_SECONDS) as process:
        task = progress.add_task("starting", total=1.0) if progress is not None else None
        for line in lines_of(process):
            news = decoder.decode(line)
            match news:
                case QuantizeProgress() if progress is not None and task is not None:
                    text = f"layer {news.layer}/{news.num_layers} {news.phase}"
                    progress.update(task, completed=news.done, description=text)
                case QuantizeLayer():
                    rows += news.rows
                    console.print(_layer_line(news), highlight=False)
                case QuantizeNote(text):
                    console.print(f"note: {text}", highlight=False)
                case QuantizeFailed(kind, message):
                    raise error_of(kind, message)
                case QuantizeDone():
                    done = news
        code = process.wait()
    if code == 130:
        raise KeyboardInterrupt
    if done is None:
        raise EngineError(f"the program ended with exit code {code}; its last words stand above")
    return rows, done


def _order(options: QuantizeOptions, calibration: CalibrationOptions, grid: GridOptions) -> QuantizeOrder:
    """Raises ConfigError for options that are missing or do not go together."""
    method = options.method
    if method is None:
        raise ConfigError(f"--method is needed: {', '.join(METHODS)}")
    if options.out is None:
        raise ConfigError("OUT is needed, the directory to write: shoal quantize MODEL OUT --method …")
    text = None
    if calibration.calibration is not None:
        text = Path(calibration.calibration).expanduser().resolve()
        if not text.is_file():
            raise ConfigError(f"--calibration {calibration.calibration}: there is no such file; a text file would work")
    elif method in CALIBRATED:
        raise ConfigError(
            f"--method {method} needs --calibration FILE: a text of the kind that the model will see, UTF-8, about "
            f"{calibration.num_samples} × {calibration.sequence_length} tokens (--num-samples, --sequence-length)"
        )
    known = _BITS[method]
    bits = known[0] if grid.bits is None else grid.bits
    if bits not in known:
        raise ConfigError(f"--bits {bits}: {method} is written with {' or '.join(map(str, known))}")
    group_size = _GROUP_SIZE if grid.group_size is None else grid.group_size
    symmetric = method == "gptq" and not grid.asym
    if method == "awq" and grid.sym:
        raise ConfigError("--sym does not go with --method awq, whose layout has zero points")
    if grid.sym and grid.asym:
        raise ConfigError("--sym and --asym contradict each other; give one of them")
    if method in CALIBRATED:
        if group_size != -1 and (group_size < 8 or group_size % 8):
            raise ConfigError(f"--group-size must be -1 or a positive multiple of 8; got {group_size}")
    elif grid.group_size is not None:
        raise ConfigError(f"--group-size does not go with --method {method}, which has a scale an output or a matrix")
    if grid.desc_act and method != "gptq":
        raise ConfigError("--desc-act is an option of --method gptq alone")
    if (grid.sym or grid.asym) and method not in CALIBRATED:
        raise ConfigError(f"--{'sym' if grid.sym else 'asym'} is an option of --method gptq alone")
    if grid.granularity == "tensor" and method != "fp8":
        raise ConfigError("--granularity tensor is an option of --method fp8 alone")
    sparsity, two_of_four = _pruning(grid.prune)
    return QuantizeOrder(
        model=str(resolve_model_path(options.model)),
        out=str(Path(options.out).expanduser().absolute()),
        method=method,
        calibration=None if text is None else str(text),
        num_samples=calibration.num_samples,
        sequence_length=calibration.sequence_length,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        desc_act=grid.desc_act,
        damp=grid.damp,
        granularity=grid.granularity,
        sparsity=sparsity,
        two_of_four=two_of_four,
        ignore=tuple(grid.ignore),
        device=options.device,
    )


def _pruning(text: str | None) -> tuple[float, bool]:
    if text is None:
        return 0.0, False
    if text == "2:4":
        return 0.5, True
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise ConfigError(f"--prune {text}: 2:4, or a share between 0 and 1 such as 0.5, would work")
    return share, False


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress | None]:
    """A bar on standard error; nothing where that is no terminal."""
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


def _layer_line(news: QuantizeLayer) -> str:
    state = "was done" if news.resumed else "done"
    if not news.rows:
        return f"layer {news.layer}/{news.num_layers} {state}: stays as it is"
    worst = max(news.rows, key=lambda row: row.error)
    mean = sum(row.error for row in news.rows) / len(news.rows)
    return f"layer {news.layer}/{news.num_layers} {state}: error {mean:.4f}, at most {worst.error:.4f} ({worst.name})"


def _print_table(order: QuantizeOrder, rows: list[MatrixRow]) -> None:
    of_what = "outputs over the calibration text" if order.calibration is not None else "weights"
    table = Table(title=Text(f"{order.method}: relative error of {of_what}"), title_justify="left")
    for title in ("layer", "matrix", "rounded to nearest", order.method, "zeros"):
        table.add_column(title, justify="left" if title == "matrix" else "right")
    for row in rows:
        table.add_row(str(row.layer), Text(row.name), f"{row.nearest:.4f}", f"{row.error:.4f}", f"{row.sparsity:.0%}")
    nearest, error = (sum(values) / len(rows) for values in zip(*((r.nearest, r.error) for r in rows), strict=True))
    table.add_section()
    table.add_row("mean", "", f"{nearest:.4f}", f"{error:.4f}", f"{sum(r.sparsity for r in rows) / len(rows):.0%}")
    console = Console()
    console.print(table, width=None if console.is_terminal else _FILE_WIDTH)


COMMAND = QuantizeCommand(
    name="quantize",
    description="Make a quantized checkpoint (GPTQ, AWQ, FP8 or INT8, with pruning where asked) of a plain one, in the "
    "layouts that Hugging Face tools read. One decoder layer is in memory at a time; the error of each matrix is "
    "reported; a run that was ended goes on where it was.",
    sections=(QuantizeOptions, CalibrationOptions, GridOptions),
    positional="model",
    run=_run,
)
