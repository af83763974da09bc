"""Collectives between CPU ranks of one host through memory that they share. `rendezvous` makes it; x86-64 only.

Each operation runs in phases. In phase p a rank writes into its slot of p's parity, posts p, waits for the others'
p and reads their slots. It posts p + 1 only after that, so who sees everyone at p + 1 may overwrite the slots of p.
Sums are taken by `tree_sum` from the slots in the order of the ranks: all ranks get the same bits, every time.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

import torch

from shoal.distributed.communicator import DeviceCommunicator, Transfer, as_bytes, tree_sum
from shoal.distributed.segment import Segment
from shoal.distributed.signals import LINE_BYTES, MAX_RANKS, PeerWatch, SignalBoard

# Up to ONE_SHOT_BYTES every rank sums everything; above, each sums its part and the parts are exchanged.
# Figures stand in benchmarks/collectives.py.
ONE_SHOT_BYTES = 64 << 10
_PAGE = 4096
# The receiver starts to copy when this much is there. Tensors start at whole cache lines of a channel.
_PIECE_BYTES = 1 << 20


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Where things lie in the segment of a group. All ranks must use the same."""

    num_ranks: int
    slot_bytes: int = 512 << 10
    channel_bytes: int = 8 << 20

    @property
    def num_lines(self) -> int:
        """A line a rank for collectives; for every pair of ranks one that counts bytes sent, one for bytes taken."""
        return self.num_ranks + 2 * self.num_ranks**2

    @property
    def slots_at(self) -> int:
        return -(-self.num_lines * LINE_BYTES // _PAGE) * _PAGE

    @property
    def channels_at(self) -> int:
        return self.slots_at + 2 * self.num_ranks * self.slot_bytes

    @property
    def num_bytes(self) -> int:
        return self.channels_at + self.num_ranks**2 * self.channel_bytes

    def sent_line(self, source: int, destination: int) -> int:
        return self.num_ranks + source * self.num_ranks + destination

    def taken_line(self, source: int, destination: int) -> int:
        return self.num_ranks + self.num_ranks**2 + source * self.num_ranks + destination


class SharedMemoryCommunicator(DeviceCommunicator):
    """pids: the processes of the ranks, by rank; their end is seen while this rank waits for them."""

    kind = "shared memory"

    def __init__(
        self, segment: Segment, layout: Layout, rank: int, names: Sequence[str], pids: Sequence[int], timeout: float
    ) -> None:
        super().__init__(rank, names, torch.device("cpu"), timeout)
        if self.size > MAX_RANKS:
            raise ValueError(f"one segment serves at most {MAX_RANKS} ranks; got {self.size}")
        self._layout = layout
        self._watch = PeerWatch(pids)
        self._signals = SignalBoard(segment.memory, layout.num_lines, rank, names, self._watch, timeout, self._progress)
        memory = torch.frombuffer(segment.memory, dtype=torch.uint8)
        self._slots = memory[layout.slots_at : layout.channels_at].view(2, self.size, layout.slot_bytes)
        channels = memory[layout.channels_at :]
        self._channels = channels.view(self.size, self.size, layout.channel_bytes)
        self._owners = [(peer, peer) for peer in range(self.size) if peer != rank]
        self._phase = self._seen = 0
        self._views: dict[tuple[torch.dtype, torch.Size], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._num_sent = [0] * self.size
        self._num_taken = [0] * self.size
        self._pending: list[deque[_Outgoing]] = [deque() for _ in range(self.size)]

    # --- collectives -------------------------------------------------------------------------------------------

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        num_bytes = x.numel() * x.element_size()
        if num_bytes > min(ONE_SHOT_BYTES, self._layout.slot_bytes):
            flat, step = x.view(-1), self._layout.slot_bytes // x.element_size()
            for start in range(0, flat.shape[0], step):
                self._all_reduce_in_parts(flat[start : start + step])
        elif num_bytes:
            slots = self._slot_views(x.dtype, x.shape)[self._begin("all_reduce")]
            slots[self.rank].copy_(x)
            self._exchange("all_reduce")
            tree_sum(slots, out=x)
        return x

    # A sum here is a tree already.
    all_reduce_tree = all_reduce

    def _all_reduce_in_parts(self, x: torch.Tensor) -> None:
        """x [elements that fit a slot]: rank r sums part r of all slots, then everyone takes all parts."""
        size = x.shape[0]
        part = -(-size // (64 * self.size)) * 64  # whole cache lines
        bounds = [(min(size, rank * part), min(size, (rank + 1) * part)) for rank in range(self.size)]
        shape = torch.Size([self._layout.slot_bytes // x.element_size()])
        slots = self._slot_views(x.dtype, shape)[self._begin("all_reduce")]
        slots[self.rank][:size].copy_(x)
        self._exchange("all_reduce")
        start, end = bounds[self.rank]
        sums = self._slot_views(x.dtype, shape)[self._begin("all_reduce")]
        tree_sum([slot[start:end] for slot in slots], out=sums[self.rank][start:end])
        self._exchange("all_reduce")
        for slot, (start, end) in zip(sums, bounds, strict=True):
            x[start:end].copy_(slot[start:end])

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        output = x.new_empty((self.size, *x.shape))
        if x.numel() * x.element_size() <= min(ONE_SHOT_BYTES, self._layout.slot_bytes) and x.numel():
            slots = self._slot_views(x.dtype, x.shape)[self._begin("all_gather")]
            slots[self.rank].copy_(x)
            self._exchange("all_gather")
            return torch.stack(slots, out=output)
        source, rows = as_bytes(x), output.view(self.size, -1).view(torch.uint8)
        for start, end in self._pieces(source):
            slots_of = self._slots[self._begin("all_gather")]
            slots_of[self.rank, : end - start].copy_(source[start:end])
            self._exchange("all_gather")
            rows[:, start:end].copy_(slots_of[:, : end - start])
        return output

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        output = x.new_empty(x.shape[1:])
        rows, flat = x.contiguous().view(self.size, -1), output.view(-1)
        step = self._layout.slot_bytes // x.element_size() // self.size
        for start in range(0, flat.shape[0], step):
            end = min(start + step, flat.shape[0])
            shape = torch.Size([self.size, end - start])
            slots = self._slot_views(x.dtype, shape)[self._begin("reduce_scatter")]
            slots[self.rank].copy_(rows[:, start:end])
            self._exchange("reduce_scatter")
            tree_sum([slot[self.rank] for slot in slots], out=flat[start:end])
        return output

    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        x = x.contiguous()
        data = as_bytes(x)
        for start, end in self._pieces(data):
            slot = self._slots[self._begin("broadcast"), source, : end - start]
            if source == self.rank:
                slot.copy_(data[start:end])
            self._signals.post(self.rank, self._phase)
            if source != self.rank:
                self._signals.wait(source, self._phase, [(source, source)], "broadcast")
                data[start:end].copy_(slot)
        return x

    def gather(self, x: torch.Tensor, destination: int) -> torch.Tensor | None:
        source = as_bytes(x.contiguous())
        output = x.new_empty((self.size, *x.shape)) if destination == self.rank else None
        for start, end in self._pieces(source):
            slots = self._slots[self._begin("gather")]
            slots[self.rank, : end - start].copy_(source[start:end])
            self._signals.post(self.rank, self._phase)
            if output is not None:
                self._wait_for_all(self._phase, "gather")
                output.view(self.size, -1).view(torch.uint8)[:, start:end].copy_(slots[:, : end - start])
        return output

    def barrier(self) -> None:
        self._begin("barrier")
        self._exchange("barrier")

    # --- sending -----------------------------------------------------------------------------------------------

    def isend(self, x: torch.Tensor, destination: int) -> Transfer:
        """Writes what fits the channel at once; the rest whenever this rank waits for anything here."""
        data = as_bytes(x.contiguous())
        if self._sent_whole(data, destination):
            return Transfer()
        outgoing = _Outgoing(data)
        self._pending[destination].append(outgoing)
        self._push(destination)
        if outgoing.is_done:
            return Transfer()
        return Transfer(lambda: self._finish(destination, outgoing), goes_on_alone=False)

    def recv(self, x: torch.Tensor, source: int) -> torch.Tensor:
        data, ring = as_bytes(x), self._channels[source, self.rank]
        sent = self._layout.sent_line(source, self.rank)
        taken = self._layout.taken_line(source, self.rank)
        position, end = 0, data.shape[0]
        while position < end:
            count = self._num_taken[source]
            self._signals.wait(sent, count + 1, [(source, sent)], "recv")
            start = count % ring.shape[0]
            num_bytes = min(end - position, self._signals.value(sent) - count, ring.shape[0] - start)
            data[position : position + num_bytes].copy_(ring[start : start + num_bytes])
            position += num_bytes
            self._num_taken[source] = count + (num_bytes if position < end else _aligned(num_bytes))
            self._signals.post(taken, self._num_taken[source])
        return x

    def _sent_whole(self, data: torch.Tensor, destination: int) -> bool:
        """The usual case, without ceremony: nothing waits, and there is room for all of it in one piece."""
        ring, num_bytes, count = self._channels[self.rank, destination], data.shape[0], self._num_sent[destination]
        taken = self._signals.value(self._layout.taken_line(self.rank, destination))
        start = count % ring.shape[0]
        room = min(ring.shape[0] - (count - taken), ring.shape[0] - start, _PIECE_BYTES)
        if self._pending[destination] or num_bytes > room:
            return False
        if num_bytes:
            ring[start : start + num_bytes].copy_(data)
            self._num_sent[destination] = count + _aligned(num_bytes)
            self._signals.post(self._layout.sent_line(self.rank, destination), self._num_sent[destination])
        return True

    def _finish(self, destination: int, outgoing: _Outgoing) -> None:
        taken = self._layout.taken_line(self.rank, destination)
        while not outgoing.is_done:
            seen = self._signals.value(taken)
            self._push(destination)
            if not outgoing.is_done:
                self._signals.wait(taken, seen + 1, [(destination, taken)], "send")

    def _push(self, destination: int) -> None:
        """Write what waits for `destination` into the channel, as far as it fits."""
        queue, ring = self._pending[destination], self._channels[self.rank, destination]
        sent = self._layout.sent_line(self.rank, destination)
        taken = self._layout.taken_line(self.rank, destination)
        while queue:
            if queue[0].is_done:
                queue.popleft()
                continue
            count = self._num_sent[destination]
            room = ring.shape[0] - (count - self._signals.value(taken))
            start = count % ring.shape[0]
            piece = queue[0].take(min(room, ring.shape[0] - start, _PIECE_BYTES))
            num_bytes = piece.shape[0]
            if not num_bytes:
                return
            ring[start : start + num_bytes].copy_(piece)
            self._num_sent[destination] = count + (_aligned(num_bytes) if queue[0].is_done else num_bytes)
            self._signals.post(sent, self._num_sent[destination])

    def _progress(self) -> bool:
        """Send on while this rank waits; True if something is left. Two ranks may so send to each other at once."""
        for destination, queue in enumerate(self._pending):
            if queue:
                self._push(destination)
        return any(self._pending)

    def close(self) -> None:
        self._watch.close()
        self._views.clear()

    # --- phases ------------------------------------------------------------------------------------------------

    def _begin(self, what: str) -> int:
        """Enter the next phase; returns its parity. This rank's slot may be written after that."""
        self._phase += 1
        if self._seen < self._phase - 1:
            self._wait_for_all(self._phase - 1, what)
        return self._phase & 1

    def _exchange(self, what: str) -> None:
        """Say that this rank's slot is written; return when everyone's is."""
        self._signals.post(self.rank, self._phase)
        self._wait_for_all(self._phase, what)

    def _wait_for_all(self, phase: int, what: str) -> None:
        for peer, line in self._owners:
            if self._signals.value(peer) < phase:
                self._signals.wait(line, phase, self._owners, what)
        self._seen = phase

    def _pieces(self, data: torch.Tensor) -> list[tuple[int, int]]:
        """Ranges of data [bytes] that fit a slot."""
        size, step = data.shape[0], self._layout.slot_bytes
        return [(start, min(start + step, size)) for start in range(0, size, step)]

    def _slot_views(self, dtype: torch.dtype, shape: torch.Size) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Every rank's slot as a tensor, by parity. Made once a shape: to make them costs more than a small sum."""
        views = self._views.get((dtype, shape))
        if views is None:
            if len(self._views) >= 512:
                self._views.clear()
            num_bytes = shape.numel() * dtype.itemsize
            even, odd = (
                [self._slots[parity, rank, :num_bytes].view(dtype).view(shape) for rank in range(self.size)]
                for parity in (0, 1)
            )
            views = self._views[dtype, shape] = (even, odd)
        return views


class _Outgoing:
    """A tensor's bytes on their way: `take` cuts off the next piece."""

    def __init__(self, data: torch.Tensor) -> None:
        self._data = data
        self._position = 0

    @property
    def is_done(self) -> bool:
        return self._position >= self._data.shape[0]

    def take(self, num_bytes: int) -> torch.Tensor:
        piece = self._data[self._position : self._position + num_bytes]
        self._position += piece.shape[0]
        return piece
