"""Why an engine of several ranks ends: what is known is gathered for a moment, then the cause is told from its effects.

A rank that dies makes the others fail in their collectives, and their messages may come first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from shoal.distributed.status import RankStatus, describe_stall

# What a rank that meets or works with others says when one of them is lost.
_EFFECTS = ("CollectiveError", "StartupError")
# For the others' messages, or the news of a death, to come.
_SECONDS_AFTER_CAUSE = 0.3
_SECONDS_AFTER_EFFECT = 1.0


class Evidence:
    """describe: how to call a rank ("rank 1 (node-b 10.0.0.4, pid 4711)")."""

    def __init__(self, describe: Callable[[int], str]) -> None:
        self._describe = describe
        self._exits: dict[int, str] = {}
        self._failures: dict[int, tuple[str, str]] = {}
        self._lost: dict[int, float] = {}
        self._others: list[str] = []
        self._decide_at: float | None = None

    def exited(self, rank: int, how: str) -> None:
        self._exits.setdefault(rank, how)
        self._wait(_SECONDS_AFTER_CAUSE)

    def failed(self, rank: int, kind: str, message: str) -> None:
        """kind: the name of a ShoalError class."""
        self._failures.setdefault(rank, (kind, message))
        self._wait(_SECONDS_AFTER_EFFECT if kind in _EFFECTS else _SECONDS_AFTER_CAUSE)

    def lost(self, rank: int, seconds: float) -> None:
        """Nothing was heard of a rank for so long."""
        if rank not in self._lost:
            self._lost[rank] = seconds
            self._wait(_SECONDS_AFTER_CAUSE)

    def noticed(self, what: str) -> None:
        """Something that a lost rank explains better, if one was lost."""
        self._others.append(what)
        self._wait(_SECONDS_AFTER_EFFECT)

    def _wait(self, seconds: float) -> None:
        decide_at = time.monotonic() + seconds
        self._decide_at = decide_at if self._decide_at is None else min(self._decide_at, decide_at)

    @property
    def seconds_left(self) -> float | None:
        """Until the cause is to be told; None while nothing has failed."""
        return None if self._decide_at is None else max(self._decide_at - time.monotonic(), 0.0)

    def cause(self) -> tuple[str, str]:
        """The name of an error class ("" for the end of a process) and the sentence: causes before their effects."""
        if died := {rank: how for rank, how in self._exits.items() if rank not in self._failures}:
            by_end: dict[str, list[str]] = {}
            for rank, how in sorted(died.items()):
                by_end.setdefault(how, []).append(self._describe(rank))
            return "", "; ".join(
                f"{first} {how}" + "".join(f"; so too {other}" for other in others)
                for how, (first, *others) in by_end.items()
            )
        own = {rank: each for rank, each in self._failures.items() if each[0] not in _EFFECTS}
        if own:
            return self._told(own)
        if self._lost:
            sentences = [
                f"nothing was heard of {self._describe(rank)} for {seconds:.0f} s: its host is down or cut off, or the "
                "process is stopped"
                for rank, seconds in sorted(self._lost.items())
            ]
            return "", "; ".join(sentences)
        return self._told(self._failures) if self._failures else ("", "; ".join(self._others))

    def _told(self, failures: dict[int, tuple[str, str]]) -> tuple[str, str]:
        """Several ranks often say the same: then it is said once."""
        by_words: dict[tuple[str, str], list[int]] = {}
        for rank, words in sorted(failures.items()):
            by_words.setdefault(words, []).append(rank)
        kind = next(iter(by_words))[0]
        sentences = []
        for (_, message), ranks in by_words.items():
            others = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
            sentences.append(f"{self._describe(ranks[0])}{others}: {message}")
        return kind, "; ".join(sentences)


def explain_stall(
    records: Sequence[RankStatus],
    pids_here: dict[int, int],
    silent: dict[int, float],
    describe: Callable[[int], str],
) -> str:
    """Who waits for whom, from the status records, and which processes of this host (pids_here) are stopped.

    silent: ranks of which nothing was heard for so many seconds.
    """
    stopped = [rank for rank, pid in sorted(pids_here.items()) if is_stopped(pid)]
    sentences = [f"{describe(rank)} is stopped (SIGSTOP, or a debugger holds it)" for rank in stopped]
    sentences += [
        f"nothing was heard of {describe(rank)} for {seconds:.0f} s: it is stopped (SIGSTOP, or a debugger holds it), "
        "or its host is down or cut off"
        for rank, seconds in sorted(silent.items())
        if rank not in stopped
    ]
    if records:
        sentences.append(describe_stall(records))
    return "; ".join(sentences) or "no rank has said what it does"


def is_stopped(pid: int) -> bool:
    """Whether a process of this host does nothing until somebody continues it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    # The name in parentheses may hold anything; the state follows the last of them.
    return stat.rpartition(")")[2].split()[0] in ("T", "t")
