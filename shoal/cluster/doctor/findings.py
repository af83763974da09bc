"""What a check says: ok, warn, fail or skip, what was seen, and what to type to mend it. `render` shows it."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

OK, WARN, FAIL, SKIP = "ok", "warn", "fail", "skip"


class Finding(msgspec.Struct, frozen=True):
    """node: whom it is about: a node's name, "a → b" for a way between two, "" for the cluster as a whole.

    mend: what to type or to change; "" for what is well.
    """

    group: str
    check: str
    status: str
    node: str
    seen: str
    mend: str = ""


class Reporter:
    """Collects the findings of one group about one node; the methods are named as the states."""

    def __init__(self, group: str, node: str) -> None:
        self._group, self._node = group, node
        self.findings: list[Finding] = []

    def ok(self, check: str, seen: str) -> None:
        self._add(check, OK, seen, "")

    def warn(self, check: str, seen: str, mend: str) -> None:
        self._add(check, WARN, seen, mend)

    def fail(self, check: str, seen: str, mend: str) -> None:
        self._add(check, FAIL, seen, mend)

    def skip(self, check: str, seen: str, mend: str = "") -> None:
        self._add(check, SKIP, seen, mend)

    def _add(self, check: str, status: str, seen: str, mend: str) -> None:
        self.findings.append(Finding(self._group, check, status, self._node, seen, mend))


def has_failed(findings: Iterable[Finding]) -> bool:
    return any(finding.status == FAIL for finding in findings)
