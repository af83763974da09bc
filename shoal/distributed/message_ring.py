"""A channel in shared memory from one process to several of its host: messages of bytes, each read by all, in order.

The executor sends steps through one; the worker with the results answers through another. x86-64 Linux only, as
`signals.supported()` says.

After the counters (bytes written; per reader, bytes taken) comes a ring of pieces: a header (bytes in it, whether
more of its message follow) and the bytes, to the next multiple of eight. Whatever does not fit in one goes in several.
"""

from __future__ import annotations

import mmap
import struct

from shoal.distributed.segment import Segment
from shoal.distributed.signals import LINE_BYTES, MAX_RANKS, Counters, Timespec

CAPACITY_BYTES = 4 << 20
MAX_READERS = MAX_RANKS - 1
_HEADER = struct.Struct("<II")
# Who waits has no deadline: it wakes this often all the same, should a wake-up have been lost with its sender.
_PAUSE = Timespec(1, 0)
_WRITTEN = 0  # the line of the writer's counter; reader i has line 1 + i


def _padded(num_bytes: int) -> int:
    return (num_bytes + 7) & ~7


class _End:
    """What both ends have. `close` may come from another thread than the one that sends or receives."""

    def __init__(self, memory: mmap.mmap, num_readers: int, index: int) -> None:
        if not 1 <= num_readers <= MAX_READERS:
            raise ValueError(f"a ring has 1 to {MAX_READERS} readers; got {num_readers}")
        self._memory = memory
        self._num_readers = num_readers
        self._counters = Counters(memory, 1 + num_readers, index, 1 + num_readers)
        self._start = (1 + num_readers) * LINE_BYTES
        self._capacity = len(memory) - self._start
        self._closed = False

    def close(self) -> None:
        """End this side, also in the middle of a wait. The memory goes with the last process that has it."""
        self._closed = True
        for line in range(1 + self._num_readers):
            self._counters.wake(line)

    def _wait(self, line: int, value: int) -> bool:
        """Until the counter is at `value`; False when this end was closed meanwhile."""
        while not self._closed:
            if self._counters.wait_briefly(line, value, _PAUSE):
                return True
        return False


class RingWriter(_End):
    """The sending end. `address` is what readers of this host open, until `release`."""

    def __init__(self, segment: Segment, num_readers: int) -> None:
        super().__init__(segment.memory, num_readers, 0)
        self._segment = segment
        self._written = 0
        # Nobody has taken less than this, as far as was looked.
        self._taken = 0

    @classmethod
    def create(cls, num_readers: int, capacity: int = CAPACITY_BYTES) -> RingWriter:
        """capacity: bytes, a multiple of eight."""
        return cls(create_ring(num_readers, capacity), num_readers)

    @classmethod
    def open(cls, address: str, num_readers: int) -> RingWriter:
        """The sending end of a ring that a reader made. OSError if that process is gone, or not visible from here."""
        return cls(Segment.open(address), num_readers)

    @property
    def address(self) -> str:
        return self._segment.address

    def release(self) -> None:
        """All have opened it."""
        self._segment.release()

    def send(self, message: bytes) -> None:
        """Returns when all of it is in the ring; waits while the slowest reader is behind by a whole ring.

        Raises BrokenPipeError once this end is closed.
        """
        position, end = 0, len(message)
        while True:
            at = self._written % self._capacity
            rest = _HEADER.size + _padded(end - position)
            # No piece goes over the end of the ring, where there is room for a header at least.
            room = self._wait_for_room(min(rest, self._capacity - at, self._capacity // 4))
            length = min(end - position, room - _HEADER.size, self._capacity - at - _HEADER.size)
            more = position + length < end
            start = self._start + at
            _HEADER.pack_into(self._memory, start, length, more)
            start += _HEADER.size
            self._memory[start : start + length] = message[position : position + length]
            position += length
            self._written += _HEADER.size + _padded(length)
            self._counters.post(_WRITTEN, self._written)
            if not more:
                return

    def _wait_for_room(self, num_bytes: int) -> int:
        """The room there is, which is `num_bytes` at least: a multiple of eight."""
        if self._closed:
            raise BrokenPipeError("this end of the ring was closed")
        wanted = self._written + num_bytes - self._capacity
        if self._taken < wanted:
            for line in range(1, 1 + self._num_readers):
                if not self._wait(line, wanted):
                    raise BrokenPipeError("this end of the ring was closed")
            self._taken = min(self._counters.value(line) for line in range(1, 1 + self._num_readers))
        return self._capacity - (self._written - self._taken)


class RingReader(_End):
    """One of the receiving ends."""

    def __init__(self, segment: Segment, index: int, num_readers: int) -> None:
        super().__init__(segment.memory, num_readers, 1 + index)
        self._segment = segment
        self._line = 1 + index
        self._taken = 0

    @classmethod
    def create(cls, capacity: int = CAPACITY_BYTES) -> RingReader:
        """The one receiving end of a ring that another process is to write to."""
        return cls(create_ring(1, capacity), 0, 1)

    @classmethod
    def open(cls, address: str, index: int, num_readers: int) -> RingReader:
        """Reader `index` of the ring at `address`. OSError if its maker is gone, or not visible from here."""
        return cls(Segment.open(address), index, num_readers)

    @property
    def address(self) -> str:
        return self._segment.address

    def release(self) -> None:
        """The writer has opened it."""
        self._segment.release()

    def receive(self) -> bytes | None:
        """The next message, however long that takes; None once this end is closed."""
        pieces = []
        while True:
            if not self._wait(_WRITTEN, self._taken + 1):
                return None
            start = self._start + self._taken % self._capacity
            length, more = _HEADER.unpack_from(self._memory, start)
            start += _HEADER.size
            pieces.append(self._memory[start : start + length])
            self._taken += _HEADER.size + _padded(length)
            self._counters.post(self._line, self._taken)
            if not more:
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def create_ring(num_readers: int, capacity: int) -> Segment:
    """The memory of a ring. capacity: bytes, a multiple of eight."""
    if capacity < 64 or capacity % 8:
        raise ValueError(f"a ring's capacity is a multiple of eight, 64 at least; got {capacity}")
    return Segment.create((1 + num_readers) * LINE_BYTES + capacity, "shoal-ring")
