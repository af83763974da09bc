"""What a run writes down: a line of JSON for each fault, and the table that is made of the lines."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec


class FaultRecord(msgspec.Struct, kw_only=True):
    """One fault. next_token: seconds from it to the next token, of each stream that its replica carried.

    carried: requests that ran on the replica. moved: of them, those that another replica went on with. checked: those
    that ended since the fault before, of which `failures` went wrong. back: seconds from the end of the fault until the
    replica was given a request again; None: that was not waited for.
    """

    number: int
    kind: str
    engine: str
    seed: int
    victim: str
    next_token: list[float] = []
    carried: int = 0
    moved: int = 0
    checked: int = 0
    back: float | None = None
    failures: list[str] = []


def append(path: Path | None, record: FaultRecord) -> None:
    if path is not None:
        with path.open("ab") as file:
            file.write(msgspec.json.encode(record) + b"\n")


def read(path: Path) -> list[FaultRecord]:
    """The records of earlier runs. A last line that was cut off is dropped, from the file too."""
    if not path.exists():
        return []
    records, whole = [], b""
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        records.append(msgspec.json.decode(line, type=FaultRecord))
        whole += line
    path.write_bytes(whole)
    return records


def table(records: Iterable[FaultRecord]) -> str:
    """A line for each kind of fault (Markdown)."""
    by_kind: dict[str, list[FaultRecord]] = {}
    for record in records:
        by_kind.setdefault(record.kind, []).append(record)
    lines = [
        "| fault | times | requests there | moved | failed | next token after s: median | worst | back after s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, own in sorted(by_kind.items()):
        waits = [seconds for record in own for seconds in record.next_token]
        back = [record.back for record in own if record.back is not None]
        cells: list[Any] = [
            kind, len(own), sum(one.carried for one in own), sum(one.moved for one in own),
            sum(len(one.failures) for one in own), _seconds(waits, statistics.median), _seconds(waits, max),
            _seconds(back, statistics.median),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _seconds(values: Sequence[float], of: Any) -> str:
    return f"{of(values):.2f}" if values else "–"


def summary(records: Sequence[FaultRecord], leaks: Sequence[str]) -> str:
    num_failures = sum(len(record.failures) for record in records)
    checked = sum(record.checked for record in records)
    lines = [table(records), "", f"{len(records)} faults, {checked} requests checked, {num_failures} failures"]
    for record in records:
        lines += [f"fault {record.number} ({record.kind}): {failure}" for failure in record.failures]
    lines += [f"left behind: {leak}" for leak in leaks]
    return "\n".join(lines)
