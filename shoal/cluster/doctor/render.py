"""Findings as people read them, and as programs do."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from shoal.cluster.doctor.facts import ClusterFacts
from shoal.cluster.doctor.findings import FAIL, OK, SKIP, WARN, Finding, has_failed

_MARKS = {OK: "ok", WARN: "warn", FAIL: "FAIL", SKIP: "skip"}
_COLORS = {OK: "\033[32m", WARN: "\033[33m", FAIL: "\033[31m", SKIP: "\033[2m"}
_RESET = "\033[0m"
_MARK_WIDTH, _CHECK_WIDTH = 4, 22


def as_text(findings: Sequence[Finding], *, color: bool, width: int) -> str:
    """By node, in the order in which they come; each mend under its finding."""
    lines: list[str] = []
    by_node: dict[str, list[Finding]] = {}
    for finding in findings:
        by_node.setdefault(finding.node, []).append(finding)
    for node, own in by_node.items():
        lines += [*([""] if lines else []), node or "all machines"]
        for finding in own:
            lines += _lines(finding, color, width)
    return "\n".join([*lines, "", summary(findings)])


def summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.status for finding in findings)
    words = {FAIL: "failed", WARN: "to look at", OK: "ok", SKIP: "skipped"}
    return ", ".join(f"{counts[status]} {word}" for status, word in words.items() if counts[status] or status == FAIL)


def refusal(findings: Sequence[Finding]) -> str:
    """What failed, as one error of several lines: the words that `as_text` has for it."""
    lines = []
    for finding in findings:
        if finding.status == FAIL:
            where = f"{finding.node}: " if finding.node else ""
            lines += [f"  {where}{finding.check}: {finding.seen}", f"    mend: {finding.mend}"]
    return "\n".join(lines)


def as_json(findings: Sequence[Finding], facts: ClusterFacts) -> str:
    content: dict[str, Any] = {
        "ok": not has_failed(findings),
        "counts": dict(Counter(finding.status for finding in findings)),
        "findings": findings,
        "facts": facts,
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode()


def _lines(finding: Finding, color: bool, width: int) -> list[str]:
    mark = _MARKS[finding.status].ljust(_MARK_WIDTH)
    head = f"  {mark}  {finding.check.ljust(_CHECK_WIDTH)}  "
    indent = " " * len(head)
    room = max(width, len(head) + 30)
    lines = textwrap.wrap(
        head + finding.seen, room, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    if color:
        lines[0] = lines[0].replace(mark, f"{_COLORS[finding.status]}{mark}{_RESET}", 1)
    if finding.mend:
        # Commands stay on one line, so that they can be copied.
        lines.append(f"{indent}mend: {finding.mend}")
    return lines
