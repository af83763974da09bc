"""Sums over the ranks of one host that leave the multiprocessors to other work: copy engines carry the parts between
GPUs, streams wait for flags in memory, and only the additions are a kernel. Made by `kernels/large_reducer.py`.

N ranks; x in N parts, of which rank r sums the r-th. P bytes that a part may have.

A call has two rounds. Each rank copies its summand's parts into the memory of those that sum them, and raises a flag
there; once all flags are up it adds what has come, in the order of the ranks, and copies the sum of its part to all.
Calls take the two slots of the memory (`distributed/symmetric_memory.py`) in turn, so that one may be under way while
the next begins. A slot holds summands [N, P], the sum [N, P], and N flags of each round, which count the slot's calls.

Nothing is overwritten too early. A rank sends its summand of a slot's call c after it has waited for call c - 1, to
which every rank has sent a part after adding what it had received: so those places are free. It sends its part of the
sum of c once all ranks have sent their summands of c, each after what it queued before on its stream, which is all that
reads the sum of c - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from shoal.distributed.communicator import LargeReducer, PendingSum
from shoal.distributed.symmetric_memory import NUM_SLOTS, CudaDriver, FlagRound, PeerMemory
from shoal.kernels.all_reduce import DTYPES, VECTOR_BYTES, _added, _finish_row, _numbers, _packed, _read, _sum, _write
from shoal.kernels.compile_ahead import is_compiling_ahead

_FLAG_BYTES = 4
_ALIGNMENT = 256
_NUM_WARPS = 4
_BLOCK = 32 * _NUM_WARPS


@triton.jit(do_not_specialize=["V", "rank"])
def _sum_parts_kernel(own, received, stride, output, V, rank, N: tl.constexpr, BLOCK: tl.constexpr):
    """output [V] of vectors: own [V] and, of the other ranks r, what stands at received + r · stride."""
    dtype: tl.constexpr = own.dtype.element_ty
    vector = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    words = ()
    for source in tl.static_range(N):
        place = tl.where(source == rank, own.to(tl.int64), received + source * stride)
        words = words + _read(place + vector * 16, vector < V)
    _write(output + vector * 16, _packed(_sum(words, N, dtype), dtype), vector < V, False)


@triton.jit(do_not_specialize=["rank"])
def _sum_rows_kernel(
    own, received, stride, residual, weight, output, eps, rank,
    N: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """own, residual [R, H], as of the other ranks at received + r · stride, a program a row: the total of all, rounded,
    to output or, with NORM, to residual and as RMSNorm leaves it to output."""
    dtype: tl.constexpr = own.dtype.element_ty
    ROW_BYTES: tl.constexpr = H * own.dtype.element_ty.primitive_bitwidth // 8
    column = tl.arange(0, BLOCK).to(tl.int64) * 16
    inside = column < ROW_BYTES
    place = tl.program_id(0).to(tl.int64) * ROW_BYTES + column
    words = ()
    for source in tl.static_range(N):
        words = words + _read(tl.where(source == rank, own.to(tl.int64), received + source * stride) + place, inside)
    added = _numbers(_read(residual.to(tl.int64) + place, inside), dtype)
    total = _packed(_added(_sum(words, N, dtype), added), dtype)
    if NORM:
        scale = _numbers(_read(weight.to(tl.int64) + column, inside), dtype)
        _finish_row(total, scale, output, residual, place, inside, eps, H, dtype)
    else:
        _write(output + place, total, inside, False)


class CopyLane:
    """A stream of one slot, beside the one that computes. Tests on a CPU have their own."""

    def __init__(self, device: torch.device, driver: CudaDriver) -> None:
        self._device, self._driver = device, driver
        # Before what else waits for a multiprocessor: the other ranks wait for this sum.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._number = self._stream.cuda_stream
        self._ready, self._event = torch.cuda.Event(), torch.cuda.Event()
        self._compiled: dict[tuple[object, ...], Any] = {}

    def begin(self) -> None:
        """What follows comes after all that is queued on the current stream."""
        self._ready.record(torch.cuda.current_stream(self._device))
        self._stream.wait_event(self._ready)

    def copy(self, destination: int, source: int, num_bytes: int) -> None:
        self._driver.copy(destination, source, num_bytes, self._number)

    def exchange(self, flags: FlagRound, value: int) -> None:
        self._driver.exchange(flags, value, self._number)

    def launch(
        self,
        kernel: triton.JITFunction,
        dtype: torch.dtype,
        num_programs: int,
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        num_warps: int,
    ) -> None:
        """arguments, constants: all of the kernel's, in their order.

        What Triton finds out about them at the first launch, types and that addresses are multiples of 16, holds for
        all others of a dtype and the same constants: they are spared the search, half of what a sum costs the host.
        """
        key = (id(kernel), dtype, constants)
        grid = (num_programs, 1, 1)
        if (compiled := self._compiled.get(key)) is not None:
            compiled[grid](*arguments, *constants, stream=self._number)
            return
        with torch.cuda.stream(self._stream):
            compiled = kernel[grid](*arguments, *constants, num_warps=num_warps)
        if not is_compiling_ahead():
            self._compiled[key] = compiled

    def end(self) -> None:
        self._event.record(self._stream)

    def join(self) -> None:
        """What the current stream does from now on comes after what this one did up to `end`."""
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """The memory there as uint8 [num_bytes]."""
        return torch.as_tensor(_DeviceBytes(address, num_bytes), device=self._device)


class _DeviceBytes:
    """What torch takes memory over from that it has not allocated."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None,
        }  # fmt: skip


def memory_bytes(num_ranks: int, max_bytes: int) -> int:
    """That sums of up to max_bytes need on each rank."""
    part = _aligned(-(-max_bytes // num_ranks))
    return NUM_SLOTS * (2 * num_ranks * part + _aligned(2 * num_ranks * _FLAG_BYTES))


class CopyReducer(LargeReducer):
    """All ranks make the same calls in the same order."""

    def __init__(self, memory: PeerMemory, min_bytes: int, max_bytes: int, lanes: list[CopyLane]) -> None:
        """memory: of `memory_bytes`, zeros. min_bytes, max_bytes: sizes that it takes. lanes: one a slot."""
        self._addresses, self._rank = memory.addresses, memory.rank
        self._size = len(memory.addresses)
        self._others = [(self._rank + index) % self._size for index in range(1, self._size)]
        self._min_bytes, self._max_bytes = min_bytes, max_bytes
        self._part_bytes = _aligned(-(-max_bytes // self._size))
        self._slot_bytes = memory.slot_bytes
        self._lanes = lanes
        self._sums = [
            lane.tensor(self._mine(slot) + self._size * self._part_bytes, self._size * self._part_bytes)
            for slot, lane in enumerate(lanes)
        ]
        self._results: list[dict[tuple[torch.Size, torch.dtype], torch.Tensor]] = [{} for _ in lanes]
        # By slot and round.
        self._flags = [[self._flag_round(slot, index) for index in range(2)] for slot in range(len(lanes))]
        self._num_calls = 0
        self._pending: list[PendingSum | None] = [None] * NUM_SLOTS

    def _flag_round(self, slot: int, index: int) -> FlagRound:
        def flag(owner: int, sender: int) -> int:
            flags = self._addresses[owner] + slot * self._slot_bytes + 2 * self._size * self._part_bytes
            return flags + (index * self._size + sender) * _FLAG_BYTES

        mine = self._rank
        return FlagRound([flag(other, mine) for other in self._others], [flag(mine, other) for other in self._others])

    def try_alone(self, row_size: int, dtype: torch.dtype) -> None:
        """Do all that a call does, with a row of zeros and without waiting for another rank, before the first call."""
        for slot, lane in enumerate(self._lanes):
            lane.begin()
            for other in self._others:
                there = self._addresses[other] + slot * self._slot_bytes
                lane.copy(there + self._rank * self._part_bytes, self._mine(slot), VECTOR_BYTES)
            lane.exchange(self._flags[slot][0], 0)
            row = self._sums[slot].view(dtype)[:row_size].view(1, row_size)
            self._sum_parts(slot, row, row.data_ptr())
            for weight in (row[0], None):
                self._sum_rows(slot, row, torch.zeros_like(row), weight, 1.0, row.data_ptr())
            lane.end()
            lane.join()

    def takes(self, x: torch.Tensor) -> bool:
        return self._is_in_range(x) and x.nbytes % (self._size * VECTOR_BYTES) == 0

    def start(self, x: torch.Tensor) -> PendingSum:
        ends = [(index + 1) * x.nbytes // self._size for index in range(self._size)]
        own = x.view(-1)[self._rank * (x.numel() // self._size) : (self._rank + 1) * (x.numel() // self._size)]
        return self._start(x, ends, lambda slot, output: self._sum_parts(slot, own, output))

    def takes_rows(self, x: torch.Tensor) -> bool:
        return (
            x.dim() == 2
            and self._is_in_range(x)
            and x.shape[1] * x.element_size() % VECTOR_BYTES == 0
            and -(-x.shape[0] // self._size) * x.shape[1] * x.element_size() <= self._part_bytes
        )

    def own_rows(self, num_rows: int) -> slice:
        return slice(*(index * num_rows // self._size for index in (self._rank, self._rank + 1)))

    def start_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
    ) -> PendingSum:
        num_rows, row_bytes = x.shape[0], x.shape[1] * x.element_size()
        ends = [(index + 1) * num_rows // self._size * row_bytes for index in range(self._size)]
        own = x[self.own_rows(num_rows)]
        assert residual.shape == own.shape and residual.is_contiguous()
        return self._start(x, ends, lambda slot, output: self._sum_rows(slot, own, residual, weight, eps, output))

    def _is_in_range(self, x: torch.Tensor) -> bool:
        return (
            x.dtype in DTYPES
            and self._min_bytes <= x.nbytes <= self._max_bytes
            and x.is_contiguous()
            and x.data_ptr() % VECTOR_BYTES == 0
        )

    def _start(self, x: torch.Tensor, ends: list[int], add: Callable[[int, int], None]) -> PendingSum:
        """ends: of the ranks' parts of x, in bytes. add: what a rank does with its part of all in a slot, to where."""
        slot, count = self._num_calls % NUM_SLOTS, self._num_calls // NUM_SLOTS + 1
        last = self._pending[slot]
        assert last is None or last.is_over, "a sum has to be waited for before the next but one is begun"
        self._num_calls += 1
        lane, rank, mine = self._lanes[slot], self._rank, self._mine(slot)
        source, starts = x.data_ptr(), [0, *ends[:-1]]
        # The parts of the result lie side by side, as those of x do.
        place, num_bytes = self._size * self._part_bytes + starts[rank], ends[rank] - starts[rank]
        lane.begin()
        for other in self._others:
            there = self._addresses[other] + slot * self._slot_bytes + rank * self._part_bytes
            lane.copy(there, source + starts[other], ends[other] - starts[other])
        lane.exchange(self._flags[slot][0], count)
        add(slot, mine + place)
        for other in self._others:
            lane.copy(self._addresses[other] + slot * self._slot_bytes + place, mine + place, num_bytes)
        lane.exchange(self._flags[slot][1], count)
        lane.end()
        key = x.shape, x.dtype
        if (result := self._results[slot].get(key)) is None:
            result = self._sums[slot][: x.nbytes].view(x.dtype).view(x.shape)
            self._results[slot][key] = result

        def finish() -> torch.Tensor:
            lane.join()
            return x  # whose memory nothing else may take before

        pending = self._pending[slot] = PendingSum(result, finish)
        return pending

    def _sum_parts(self, slot: int, own: torch.Tensor, output: int) -> None:
        num_vectors = own.nbytes // VECTOR_BYTES
        arguments = (own, self._mine(slot), self._part_bytes, output, num_vectors, self._rank)
        self._lanes[slot].launch(
            _sum_parts_kernel, own.dtype, -(-num_vectors // _BLOCK), arguments, (self._size, _BLOCK), _NUM_WARPS
        )

    def _sum_rows(
        self, slot: int, own: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, output: int
    ) -> None:
        num_rows, size = own.shape
        if not num_rows:
            return
        # A thread has a vector of its own, or several.
        block = max(32, triton.next_power_of_2(size * own.element_size() // VECTOR_BYTES))
        scale = residual if weight is None else weight
        arguments = (own, self._mine(slot), self._part_bytes, residual, scale, output, eps, self._rank)
        constants = (self._size, size, block, weight is not None)
        self._lanes[slot].launch(_sum_rows_kernel, own.dtype, num_rows, arguments, constants, min(32, block // 32))

    def _mine(self, slot: int) -> int:
        return self._addresses[self._rank] + slot * self._slot_bytes


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
