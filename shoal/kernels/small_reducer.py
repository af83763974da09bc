"""Gives a group of GPUs of one host its way to sum small tensors, after a check and a measurement on these very links.
The worker calls `attach_small_reducer` on all ranks, once groups are formed.

Who sums what is measured at the start: it depends on the number of ranks and on how their GPUs are connected. Figures
stand in benchmarks/all_reduce.py.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from shoal import log
from shoal.distributed.communicator import SmallReducer
from shoal.distributed.group import GroupCoordinator
from shoal.kernels.support import has_kernels

if TYPE_CHECKING:
    from shoal.kernels.all_reduce import PeerKernels

_logger = log.get_logger(__name__)

# What is measured, in bytes of bf16, and how often in one replay.
_SIZES = tuple(kilobytes << 10 for kilobytes in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192))
_CALLS = 20
_REPLAYS = 3
# NCCL serves larger ones; being a little slower at one size may be noise.
_TOLERANCE = 1.03
# NCCL's time for the largest size below which ranks do not compute in halves to hide its sums. Between two H100s on
# NVLink (56 µs) a layer of 8192 tokens took 3.42 ms in halves and 3.47 whole, and a run of batches was 3 % slower in
# halves: NCCL's kernels and the products take multiprocessors from each other. Sums by copies (`large_reducer.py`) do
# not.
_QUICK_MICROSECONDS = 100.0
_CHECK_BYTES = (1 << 10, 96 << 10, 1536 << 10)


class MeasuredReducer(SmallReducer):
    """one_shot_bytes, two_shot_bytes: up to which size of x each is used; nothing above the greater one."""

    def __init__(
        self, kernels: PeerKernels, one_shot_bytes: int, two_shot_bytes: int, figures: str = "not measured"
    ) -> None:
        self._kernels = kernels
        self.one_shot_bytes, self.two_shot_bytes = one_shot_bytes, two_shot_bytes
        self._figures = figures

    def takes(self, x: torch.Tensor) -> bool:
        two_shot = self._two_shot(x)
        return two_shot is not None and self._kernels.fits(x, two_shot)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.all_reduce(x, bool(self._two_shot(x)))

    def takes_rows(self, x: torch.Tensor) -> bool:
        two_shot = self._two_shot(x)
        return two_shot is not None and self._kernels.fits_rows(x, two_shot)

    def all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._kernels.all_reduce_add_norm(x, residual, weight, eps, bool(self._two_shot(x)))

    def takes_gather(self, x: torch.Tensor) -> bool:
        # It sends twice the bytes of x to all, as one-shot does x.
        return 2 * x.nbytes <= self.one_shot_bytes and self._kernels.fits_gather(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.all_gather(x)

    def describe(self) -> str:
        return (
            f"one-shot up to {_text(self.one_shot_bytes)}, two-shot up to {_text(self.two_shot_bytes)}, NCCL above "
            f"({self._figures})"
        )

    def _two_shot(self, x: torch.Tensor) -> bool | None:
        """How x is summed, by its size; None: not here."""
        if x.nbytes <= self.one_shot_bytes:
            return False
        return True if x.nbytes <= self.two_shot_bytes else None


def attach_small_reducer(group: GroupCoordinator) -> str:
    """Attach a SmallReducer to the group on all its ranks, or on none. Returns what sums its tensors, and why.

    All ranks call it, with the device of the group current. A group without shared memory stays as it is. A sum that
    waits for a rank for about as long as the communicator would ends the process.
    """
    if group.world_size == 1:
        return "one rank: nothing to sum"
    assert group.communicator is not None
    kind = group.communicator.kind
    if group.memory is None:
        return f"{kind}: the ranks do not share the memory of their GPUs"
    kernels = _prepare(group)
    if kernels is None:
        return f"{kind}: the kernels for small sums do not run on all ranks"
    if not group.agree(_is_right(kernels, group)):
        _logger.warning("small sums through the GPUs' shared memory came out wrong, so they are left to %s", kind)
        return f"{kind}: small sums through shared memory came out wrong"
    times = _measure(kernels, group)
    group.sums_are_quick = times[-1][-1] < _QUICK_MICROSECONDS
    one_shot, two_shot = choose(_SIZES, times)
    reducer = MeasuredReducer(kernels, one_shot, two_shot, _table(times, kind))
    if not max(one_shot, two_shot):
        return f"{kind}: it is faster at all sizes ({_table(times, kind)})"
    group.attach(reducer)
    return reducer.describe()


def choose(sizes: Sequence[int], times: Sequence[Sequence[float]]) -> tuple[int, int]:
    """(bytes up to which one-shot is used, bytes up to which two-shot is, above that).

    times: microseconds [sizes][one-shot, two-shot, communicator]; inf: does not fit. Each is used from the smallest
    size on, as long as it is the best.
    """
    one_shot = limit = 0
    for size, (one, two, other) in zip(sizes, times, strict=True):
        if min(one, two) > other * _TOLERANCE:
            break
        limit = size
        # The largest size at which it is as good: a little slower at a smaller one is noise.
        if one <= min(two, other) * _TOLERANCE:
            one_shot = size
    two_shot = one_shot
    for size, (_, two, other) in zip(sizes, times, strict=True):
        if one_shot < size <= limit:
            if two > other * _TOLERANCE:
                break
            two_shot = size
    return one_shot, two_shot


def _prepare(group: GroupCoordinator) -> PeerKernels | None:
    """Compile and load the kernels, each with nothing to do, so that whatever fails does before a rank waits."""
    assert group.memory is not None and group.communicator is not None
    device, timeout = group.memory.device, group.communicator.timeout
    kernels: PeerKernels | None = None
    if has_kernels(device):
        try:
            kernels = importlib.import_module("shoal.kernels.all_reduce").PeerKernels(group.memory, timeout)
            for two_shot in (False, True):
                kernels.all_reduce(torch.empty(0, dtype=torch.bfloat16, device=device), two_shot)
            kernels.all_gather(torch.empty(0, dtype=torch.int32, device=device))
            torch.cuda.synchronize(device)
        except Exception as error:  # Triton's compiler, its C compiler, the driver
            _logger.info("the kernels for small sums do not run here: %s", str(error).split("\n")[0])
            kernels = None
    return kernels if group.agree(kernels is not None) else None


def _is_right(kernels: PeerKernels, group: GroupCoordinator) -> bool:
    """Of numbers that every rank knows of all ranks, whose sums are exact in bf16."""
    mine = torch.arange(512, device=kernels.device) * -7919 + group.rank_in_group
    right = torch.equal(kernels.all_gather(mine) - mine, (torch.arange(group.world_size, device=kernels.device)
                        - group.rank_in_group)[:, None].expand(-1, 512))  # fmt: skip
    for num_bytes in _CHECK_BYTES:
        for two_shot in (False, True):
            indices = torch.arange(num_bytes // 2, device=kernels.device)
            parts = [((indices * (rank + 3) + rank) % 17 - 8).to(torch.bfloat16) for rank in range(group.world_size)]
            x = parts[group.rank_in_group].clone()
            if kernels.fits(x, two_shot):
                kernels.all_reduce(x, two_shot)
                right = right and torch.equal(x, torch.stack(parts).float().sum(0).to(torch.bfloat16))
    return right


def _measure(kernels: PeerKernels, group: GroupCoordinator) -> list[list[float]]:
    """Microseconds [sizes][one-shot, two-shot, communicator] of rank 0, on all ranks."""
    assert group.communicator is not None
    communicator = group.communicator
    times = []
    for num_bytes in _SIZES:
        x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=kernels.device)
        ways: list[Callable[[], object] | None] = [
            partial(kernels.all_reduce, x, two_shot) if kernels.fits(x, two_shot) else None
            for two_shot in (False, True)
        ]
        ways.append(partial(communicator.all_reduce, x))
        times.append([float("inf") if way is None else _time(way, group) for way in ways])
    # NCCL may not end while graphs hold its operations.
    gc.collect()
    table = torch.tensor(times, dtype=torch.float64, device=kernels.device)
    return group.broadcast(table).tolist()


def _time(call: Callable[[], object], group: GroupCoordinator) -> float:
    """Microseconds of one of several calls in a CUDA graph: the best of some replays."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_CALLS):
            call()
    best = float("inf")
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The ranks wait for each other in the first, so that the second says what the device needs.
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1e3 / _CALLS)
    graph.reset()
    return best


def _table(times: Sequence[Sequence[float]], kind: str) -> str:
    rows = ", ".join(
        f"{_text(size)} {'/'.join('–' if value == float('inf') else f'{value:.1f}' for value in row)}"
        for size, row in zip(_SIZES, times, strict=True)
    )
    return f"µs one-shot/two-shot/{kind}: {rows}"


def _text(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KB"
