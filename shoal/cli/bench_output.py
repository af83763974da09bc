"""How `shoal bench` shows figures: a table on standard output, and JSON in a file."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shoal.errors import ConfigError
from shoal.stats import Summary
from shoal.version import __version__

_FILE_WIDTH = 120


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Names on the left, figures on the right."""
    table = Table(title=Text(title), title_justify="left", show_header=False)
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    console = Console()
    console.print(table, width=None if console.is_terminal else _FILE_WIDTH)


def summary_row(summary: Summary) -> str:
    """The percentiles of one series."""
    return f"p50 {summary.p50:.2f}  p90 {summary.p90:.2f}  p99 {summary.p99:.2f}  mean {summary.mean:.2f}"


def check_writable(path: str) -> None:
    """Raise ConfigError before a long measurement whose figures could not be written."""
    if not Path(path).expanduser().resolve().parent.is_dir():
        raise ConfigError(f"--json {path}: there is no such directory")


def write_json(path: str, kind: str, details: dict[str, Any]) -> None:
    """Write what was measured, with the date, the version and the machine. Raises ConfigError."""
    head = {
        "benchmark": kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "shoal": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    try:
        Path(path).expanduser().write_text(json.dumps(head | details, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written: {error}") from error
