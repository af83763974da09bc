"""What differs: the files of one machine from a list of sums, or those of several nodes from each other. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

MISSING = "missing"


@dataclasses.dataclass(frozen=True)
class FileSums:
    """What one machine has: sums by name, and why there is none, by name."""

    sums: Mapping[str, str]
    unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def state(self, name: str) -> str:
        """The sum, "missing", or "unreadable: …"."""
        if name in self.sums:
            return self.sums[name]
        return f"unreadable: {self.unreadable[name]}" if name in self.unreadable else MISSING


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A file against the list. trouble: "" when it is as listed."""

    name: str
    trouble: str = ""


@dataclasses.dataclass(frozen=True)
class Difference:
    """A file that is not the same everywhere, or not as listed. groups: what it is (see FileSums.state), and on which
    nodes, most nodes first. expected: the list's sum, or the one that more than half of the nodes have."""

    name: str
    groups: list[tuple[str, list[str]]]
    expected: str | None

    @property
    def nodes(self) -> list[str]:
        """Those to look at: with another state than the expected one, or all where none is expected."""
        return [node for state, nodes in self.groups if state != self.expected for node in nodes]


def relative_to(root: Path, listed: Mapping[str, str], *, is_file: bool) -> dict[str, str]:
    """A list's entries by the names that `root` is looked through with.

    Lists are often made in the directory above, or with absolute names. Of a root that is a file only its own entry
    counts.
    """
    names = {name: _below(root.parent if is_file else root, name) for name in listed}
    if is_file:
        own = [listed[name] for name, short in names.items() if Path(short).name == root.name]
        return {root.name: own[0]} if own else {}
    prefix = f"{root.name}/"
    if all(short.startswith(prefix) for short in names.values()) and not (root / root.name).exists():
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
    return {short: listed[name] for name, short in names.items()}


def _below(root: Path, name: str) -> str:
    path = Path(name)
    if not path.is_absolute():
        return name
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else name


def compare_with_list(found: FileSums, listed: Mapping[str, str]) -> list[Verdict]:
    """One for each file that is listed or there: in the list's order, then those that it does not name."""
    verdicts = []
    for name, digest in listed.items():
        state = found.state(name)
        trouble = "" if state == digest else f"the sum is {state}" if name in found.sums else state
        verdicts.append(Verdict(name, trouble))
    for name in _sorted({*found.sums, *found.unreadable} - set(listed)):
        trouble = found.state(name) if name in found.unreadable else "not in the list"
        verdicts.append(Verdict(name, trouble))
    return verdicts


def compare_nodes(nodes: Mapping[str, FileSums], listed: Mapping[str, str] | None = None) -> list[Difference]:
    """The files that differ between nodes (those that answered), or from the list where there is one. By name."""
    names = {name for found in nodes.values() for name in (*found.sums, *found.unreadable)} | set(listed or ())
    differences = []
    for name in _sorted(names):
        by_state: dict[str, list[str]] = {}
        for node, found in nodes.items():
            by_state.setdefault(found.state(name), []).append(node)
        groups = sorted(by_state.items(), key=lambda group: -len(group[1]))
        most = groups[0][0] if 2 * len(groups[0][1]) > len(nodes) else None
        expected = most if listed is None else listed.get(name, MISSING)
        sound = len(groups) == 1 and (groups[0][0] == expected) and name not in _unreadable(nodes.values())
        if not sound:
            differences.append(Difference(name, groups, expected))
    return differences


def _unreadable(all_found: Iterable[FileSums]) -> set[str]:
    return {name for found in all_found for name in found.unreadable}


def _sorted(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: name.encode(errors="surrogateescape"))
