"""Gives a group of GPUs of one host its way to sum large tensors while they compute something else, after a check and a
measurement on these very links. The worker calls `attach_large_reducer` on all ranks, once the model is loaded.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from shoal import log
from shoal.config.graph_sizes import LARGE_SUM_BYTES
from shoal.distributed.communicator import LargeReducer, PendingSum
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.symmetric_memory import NUM_SLOTS, CudaDriver, PeerMemory
from shoal.errors import StartupError
from shoal.kernels.support import has_kernels

if TYPE_CHECKING:
    from shoal.kernels.copied_sum import CopyReducer

_logger = log.get_logger(__name__)

# Of a half; larger steps are computed whole. The memory for both takes four times as much.
_MAX_BYTES = LARGE_SUM_BYTES // 4
# Of the communicator's time alone: that a copied sum takes no multiprocessor is worth some patience.
_PATIENCE = 2.0
_CALLS = 4
_REPEATS = 5
# That one sum of the check may take.
_SECONDS = 60.0
# Of the largest half in fp32: what two sums of the check and what they are compared with take.
_COPIES = 8


def attach_large_reducer(
    group: GroupCoordinator,
    rows: tuple[int, int],
    row_size: int,
    dtype: torch.dtype,
    share: Callable[[int], PeerMemory | None],
) -> str | None:
    """Attach a LargeReducer to the group on all its ranks, or on none. Returns what sums its tensors, and why; None
    where no step has halves that are worth the while, or the group shares no memory.

    rows, row_size, dtype: of the smallest and the largest half [T, H]. share: makes so many bytes of memory that all
    ranks have mapped, zeros; None where that does not work. All ranks call this with the device of the group current.
    Raises StartupError where what one rank sends never comes.
    """
    row_bytes = row_size * dtype.itemsize
    # Every rank sums as many rows.
    most = -(-rows[1] // group.world_size) * group.world_size * row_bytes
    min_bytes, max_bytes = rows[0] * row_bytes, min(most, _MAX_BYTES)
    if group.world_size == 1 or max_bytes < min_bytes or group.memory is None:
        return None
    communicator = group.communicator
    assert communicator is not None
    kind, device = communicator.kind, group.memory.device
    module = importlib.import_module("shoal.kernels.copied_sum") if has_kernels(device) else None
    if not group.agree(module is not None):
        return f"{kind}: the kernels for large sums do not run on all ranks"
    assert module is not None
    # What loading left in torch's cache is nobody's else.
    torch.cuda.empty_cache()
    num_bytes = module.memory_bytes(group.world_size, max_bytes)
    memory = share(num_bytes)
    if memory is None:
        return f"{kind}: the ranks cannot share {num_bytes >> 20} MB for large sums"
    reducer = _prepare(module, memory, (min_bytes, max_bytes), row_size, dtype, group)
    # The memory stays taken: graphs of other sums may run on the device that unmapping would wait for.
    lost = f"; {num_bytes >> 20} MB stay taken"
    if reducer is None:
        return f"{kind}: copies between GPUs and flags do not work on all ranks{lost}"
    check = StartCheck(reducer, group, row_size, dtype, device)
    most_rows = max_bytes // row_bytes
    has_room = group.agree(check.has_room(most_rows))
    is_right = has_room and group.agree(check.is_right(rows[0], most_rows))
    times = [0.0, 0.0]
    if is_right:
        x = torch.zeros(rows[0] // group.world_size * group.world_size, row_size, dtype=dtype, device=device)
        own = torch.zeros_like(x[reducer.own_rows(x.shape[0])])
        times = [
            _time(lambda: reducer.start_add_norm(x, own, None, 0.0), group.rank),
            _time(lambda: communicator.start_all_reduce(x), group.rank),
        ]
        del x, own
    copied, other = group.broadcast(torch.tensor(times, dtype=torch.float64, device=device)).tolist()
    # Nobody is to take what the check took for what a step takes.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    if not has_room:
        return f"{kind}: a rank has no memory left to check large sums in{lost}"
    if not is_right:
        _logger.warning("large sums by copies between GPUs came out wrong, so they are left to %s%s", kind, lost)
        return f"{kind}: large sums by copies came out wrong{lost}"
    figures = f"{min_bytes >> 20} MB: {copied:.0f} µs, {kind} {other:.0f}"
    if copied > other * _PATIENCE:
        return f"{kind}: it is faster ({figures}){lost}"
    group.attach_large(reducer)
    return f"halves of {min_bytes >> 20} MB and more by copy engines, while the other is computed ({figures})"


def _prepare(
    module: ModuleType,
    memory: PeerMemory,
    sizes: tuple[int, int],
    row_size: int,
    dtype: torch.dtype,
    group: GroupCoordinator,
) -> CopyReducer | None:
    """Everything is set up and tried on this rank's own before a rank waits for another."""
    device, reducer = memory.device, None
    try:
        driver = CudaDriver()
        lanes = [module.CopyLane(device, driver) for _ in range(NUM_SLOTS)]
        reducer = module.CopyReducer(memory, *sizes, lanes)
        reducer.try_alone(row_size, dtype)
        torch.cuda.synchronize(device)
    except Exception as error:  # Triton's compiler, its C compiler, the driver
        _logger.info("large sums by copies between GPUs do not work here: %s", str(error).split("\n")[0])
        reducer = None
    return reducer if group.agree(reducer is not None) else None


class StartCheck:
    """Sums two at a time, of numbers that every rank knows of all ranks: small integers, so that sums are exact."""

    def __init__(
        self, reducer: LargeReducer, group: GroupCoordinator, row_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._reducer, self._group, self._row_size, self._dtype, self._device = reducer, group, row_size, dtype, device

    def has_room(self, most: int) -> bool:
        """Whether there is memory for a check of so many rows: a rank that ran out of it in the midst of one would keep
        the others waiting."""
        try:
            torch.empty(_COPIES, most, self._row_size, dtype=torch.float32, device=self._device)
        except torch.OutOfMemoryError:
            return False
        return True

    def is_right(self, fewest: int, most: int) -> bool:
        """Of so many rows. StartupError where a sum does not come."""
        right = True
        for turn in range(4):
            num_rows = most if turn == 0 else fewest
            # Each way through each slot.
            begin = [self._rows, self._sum] if turn % 2 else [self._sum, self._rows]
            checks = [each(num_rows, turn) for each in begin]
            right = all([check() for check in checks]) and right
        return right

    def _sum(self, num_rows: int, turn: int) -> Callable[[], bool]:
        """Begin a sum; what is returned waits for it and looks at it."""
        x = self._numbers(num_rows, self._group.rank_in_group, turn)
        if not self._reducer.takes(x):  # parts that are no whole vectors
            return lambda: True
        pending = self._reducer.start(x)
        return lambda: torch.equal(self._come(pending), self._total(num_rows, turn).to(self._dtype))

    def _rows(self, num_rows: int, turn: int) -> Callable[[], bool]:
        x = self._numbers(num_rows, self._group.rank_in_group, turn)
        if not self._reducer.takes_rows(x):  # a rank more rows than there is room for
            return lambda: True
        rows = self._reducer.own_rows(num_rows)
        residual = torch.full_like(x[rows], 3.0)
        weight = torch.ones_like(x[0]) if turn // 2 else None
        pending = self._reducer.start_add_norm(x, residual, weight, 1e-5)

        def check() -> bool:
            result, total = self._come(pending), self._total(num_rows, turn).add_(3.0)
            if weight is None:
                return torch.equal(result, total.to(self._dtype))
            expected = F.rms_norm(total, (self._row_size,), None, 1e-5)
            is_kept = torch.equal(residual, total[rows].to(self._dtype))
            return is_kept and torch.allclose(result.float(), expected, rtol=2**-6, atol=2**-6)

        return check

    def _numbers(self, num_rows: int, rank: int, turn: int) -> torch.Tensor:
        numbers = torch.arange(num_rows * self._row_size, dtype=torch.int32, device=self._device)
        numbers.mul_(rank + 3).add_(rank + turn).remainder_(17).sub_(8)
        return numbers.to(self._dtype).view(num_rows, self._row_size)

    def _total(self, num_rows: int, turn: int) -> torch.Tensor:
        """Of all ranks' numbers, fp32."""
        total = torch.zeros(num_rows, self._row_size, device=self._device)
        for rank in range(self._group.world_size):
            total += self._numbers(num_rows, rank, turn)
        return total

    def _come(self, pending: PendingSum) -> torch.Tensor:
        """The sum, once it is there. A stream would wait for it for ever."""
        result = pending.wait()
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            _await(event, self._group.rank)
        return result


def _await(event: torch.cuda.Event, rank: int) -> None:
    deadline = time.monotonic() + _SECONDS
    while not event.query():
        if time.monotonic() > deadline:
            raise StartupError(
                f"rank {rank} waited {_SECONDS:.0f} s for a sum by copies between the GPUs of this host: what one of "
                "them writes into another's memory does not arrive, or a rank has stopped"
            )
        time.sleep(1e-4)


def _time(start: Callable[[], PendingSum], rank: int) -> float:
    """Microseconds of one of several calls in a row: the best of some repeats."""
    best = float("inf")
    for _ in range(_REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The ranks wait for each other in the first.
        start().wait()
        begin.record()
        for _ in range(_CALLS):
            start().wait()
        end.record()
        _await(end, rank)
        best = min(best, begin.elapsed_time(end) * 1e3 / _CALLS)
    return best
