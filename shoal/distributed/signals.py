"""Counters in shared memory that one process raises and others wait for: a short spin, then a futex.

The shared-memory communicator and the message ring wait here. It relies on x86-64's order of memory accesses:
`supported()` says if so.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import select
import sys
import threading
import time
from collections.abc import Callable, Sequence

from shoal.errors import CollectiveError

LINE_BYTES = 64  # a cache line each: the counter, then a byte for every process that may sleep on it
MAX_RANKS = LINE_BYTES - 8
SPIN_SECONDS = 20e-6
_SLICE_NANOSECONDS = 20_000_000  # the longest sleep between two looks at the clock and at the peers
_SHORT_SLICE_NANOSECONDS = 200_000  # while something is to be sent on
_SYS_FUTEX = 202  # x86-64
_FUTEX_WAIT = 0
_FUTEX_WAKE = 1
_EVERYONE = 2**31 - 1


class Timespec(ctypes.Structure):
    """How long a sleep may last."""

    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def supported() -> bool:
    """True where counters may be read and written without explicit fences: Linux on x86-64."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


class PeerWatch:
    """Which of some processes have ended, seen by the kernel's own handles: a zombie counts, a reused pid does not."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._poll = select.poll()
        self._rank_of: dict[int, int] = {}
        self._ended: set[int] = set()
        for rank, pid in enumerate(pids):
            if pid == os.getpid():
                continue
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                self._ended.add(rank)
                continue
            self._rank_of[descriptor] = rank
            self._poll.register(descriptor, select.POLLIN)

    def ended(self) -> set[int]:
        """Positions in `pids` of the processes that have ended."""
        for descriptor, _ in self._poll.poll(0):
            self._ended.add(self._rank_of[descriptor])
        return self._ended

    def close(self) -> None:
        for descriptor in self._rank_of:
            self._poll.unregister(descriptor)
            os.close(descriptor)
        self._rank_of.clear()


class Counters:
    """`num_lines` counters at the start of `memory`, among `size` processes (at most MAX_RANKS); this one is `index`.

    Each counter has one process that raises it; one thread of any other may wait for it.
    """

    def __init__(self, memory: mmap.mmap, num_lines: int, index: int, size: int) -> None:
        self._bytes = memoryview(memory)[: num_lines * LINE_BYTES]
        self._words = self._bytes.cast("Q")
        self._sleeper_words = range(1, 1 + (size + 7) // 8)
        self._index = index
        # With more processes than cores, whoever spins takes the core of the one that it waits for.
        self._spin_seconds = SPIN_SECONDS if size <= len(os.sched_getaffinity(0)) else 0.0
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._syscall = ctypes.CDLL(None).syscall
        self._fence = threading.Lock()

    def value(self, line: int) -> int:
        return self._words[line * 8]

    def post(self, line: int, value: int) -> None:
        """Raise a counter: everything written before it is seen by whoever sees it. Wakes those who sleep on it."""
        words, first = self._words, line * 8
        words[first] = value
        # Taking a lock is a locked instruction, so a full fence on x86-64: who sleeps must be read after the post.
        with self._fence:
            pass
        for word in self._sleeper_words:
            if words[first + word]:
                self.wake(line)
                return

    def wait_briefly(self, line: int, value: int, pause: Timespec) -> bool:
        """Wait until the counter is at `value` or past it, or about as long as `pause`; returns whether it is."""
        if self._spin(line, value):
            return True
        sleeper = line * LINE_BYTES + 8 + self._index
        self._bytes[sleeper] = 1
        try:
            seen = self._words[line * 8]
            if seen < value:
                self._sleep_once(line, seen, pause)
        finally:
            self._bytes[sleeper] = 0
        return self._words[line * 8] >= value

    def wake(self, line: int) -> None:
        """Let everyone who sleeps on this counter look again."""
        self._futex(line, _FUTEX_WAKE, _EVERYONE, None)

    def _spin(self, line: int, value: int) -> bool:
        words, index = self._words, line * 8
        if words[index] >= value:
            return True
        if self._spin_seconds:
            end = time.perf_counter() + self._spin_seconds
            while time.perf_counter() < end:
                if words[index] >= value:
                    return True
        return False

    def _sleep_once(self, line: int, seen: int, pause: Timespec) -> None:
        """Sleep unless the counter is no longer at `seen`, until it is raised or `pause` is over."""
        self._futex(line, _FUTEX_WAIT, seen & 0xFFFFFFFF, ctypes.byref(pause))

    def _futex(self, line: int, operation: int, value: int, timeout: object) -> None:
        # Errors need no look: a wait that returns for any reason is followed by a look at the counter.
        self._syscall(
            ctypes.c_long(_SYS_FUTEX),
            ctypes.c_void_p(self._address + line * LINE_BYTES),
            ctypes.c_int(operation),
            ctypes.c_uint32(value),
            timeout,
            None,
            ctypes.c_int(0),
        )


class SignalBoard(Counters):
    """Counters of a group's ranks, waited for with a deadline: whoever does not come is named, or has ended."""

    def __init__(
        self,
        memory: mmap.mmap,
        num_lines: int,
        rank: int,
        names: Sequence[str],
        watch: PeerWatch,
        timeout: float,
        progress: Callable[[], bool],
    ) -> None:
        """names: how errors call the ranks. timeout: seconds that a wait may take.

        progress: called while a wait sleeps; True if it is to be called again soon.
        """
        super().__init__(memory, num_lines, rank, len(names))
        self._progress = progress
        self._rank, self._names, self._watch, self._timeout = rank, names, watch, timeout
        self._slice = Timespec(0, _SLICE_NANOSECONDS)
        self._short_slice = Timespec(0, _SHORT_SLICE_NANOSECONDS)

    def wait(self, line: int, value: int, owners: Sequence[tuple[int, int]], what: str) -> None:
        """Return once the counter is at `value` or past it.

        owners: (rank, line) of all whom this operation needs: CollectiveError when one of them has ended without
        posting `value`, or after the timeout. what: the operation, for the error.
        """
        if not self._spin(line, value):
            self._sleep(line, value, owners, what)

    def _sleep(self, line: int, value: int, owners: Sequence[tuple[int, int]], what: str) -> None:
        words, index = self._words, line * 8
        sleeper = line * LINE_BYTES + 8 + self._rank
        deadline = time.monotonic() + self._timeout
        self._bytes[sleeper] = 1
        try:
            while (seen := words[index]) < value:
                self._sleep_once(line, seen, self._short_slice if self._progress() else self._slice)
                if words[index] < value:
                    self._check(value, owners, deadline, what)
        finally:
            self._bytes[sleeper] = 0

    def _check(self, value: int, owners: Sequence[tuple[int, int]], deadline: float, what: str) -> None:
        ended = self._watch.ended()
        absent = [rank for rank, line in owners if self._words[line * 8] < value and rank != self._rank]
        if lost := [rank for rank in absent if rank in ended]:
            raise CollectiveError(
                f"{self._names[self._rank]} is in {what}, but {self._list(lost)} ended before it came"
            )
        if time.monotonic() >= deadline and absent:
            raise CollectiveError(
                f"{self._names[self._rank]} waited {self._timeout:g} s in {what} for {self._list(absent)}"
            )

    def _list(self, ranks: Sequence[int]) -> str:
        return ", ".join(self._names[rank] for rank in ranks)
