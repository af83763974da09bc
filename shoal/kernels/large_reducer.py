"""Gives a group of GPUs of one host its way to sum large tensors while they compute something else, after a check and a
measurement on these very links. The worker calls `attach_large_reducer` on all ranks, once the model is loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from shoal import log
from shoal.distributed.communicator import PendingSum
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.symmetric_memory import NUM_SLOTS, CudaDriver, PeerMemory
from shoal.kernels.support import has_kernels

if TYPE_CHECKING:
    from shoal.kernels.copied_sum import CopyReducer

_logger = log.get_logger(__name__)

# From which size of a half on a layer in halves is faster than one whose ranks sum in between; and what memory it may
# take, which grows with the tokens of a step.
MIN_BYTES = 16 << 20
_MAX_MEMORY = 1 << 30
# Of the communicator's time alone: that a copied sum takes no multiprocessor is worth some patience.
_PATIENCE = 2.0
_CALLS = 4
_REPEATS = 5


def attach_large_reducer(
    group: GroupCoordinator,
    min_rows: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    share: Callable[[int], PeerMemory | None],
) -> str | None:
    """Attach a LargeReducer to the group on all its ranks, or on none. Returns what sums its tensors, and why; None
    where no sum would be large enough.

    shape, dtype: of the largest tensor [T, H]; min_rows: T of the smallest for which it is worth the while. share:
    makes so many bytes of memory that all ranks have mapped, zeros; None where that does not work. All ranks call this
    with the device of the group current.
    """
    num_rows, row_size = shape
    row_bytes = row_size * dtype.itemsize
    # Every rank sums as many rows.
    max_bytes = -(-num_rows // group.world_size) * group.world_size * row_bytes
    min_bytes = max(MIN_BYTES, min_rows * row_bytes)
    if group.world_size == 1 or max_bytes < min_bytes or group.memory is None:
        return None
    assert group.communicator is not None
    kind, device = group.communicator.kind, group.memory.device
    module = importlib.import_module("shoal.kernels.copied_sum") if has_kernels(device) else None
    if not group.agree(module is not None):
        return f"{kind}: the kernels for large sums do not run on all ranks"
    assert module is not None
    num_bytes = module.memory_bytes(group.world_size, max_bytes)
    if num_bytes > _MAX_MEMORY:
        return f"{kind}: large sums beside other work would take {num_bytes >> 20} MB of memory"
    memory = share(num_bytes)
    if memory is None:
        return f"{kind}: the ranks do not share so much memory"
    reducer = _prepare(module, memory, (min_bytes, max_bytes), row_size, dtype, group)
    if reducer is None:
        return f"{kind}: copies between GPUs and flags do not work on all ranks"
    rows = -(-min_bytes // (2 * row_size))
    is_right = group.agree(_is_right(reducer, group, rows, row_size, device))
    x = torch.zeros(rows, row_size, dtype=torch.bfloat16, device=device)
    times = [_time(reducer.start, x), _time(group.communicator.start_all_reduce, x)] if is_right else [0.0, 0.0]
    copied, other = group.broadcast(torch.tensor(times, dtype=torch.float64, device=device)).tolist()
    del x
    # What the check and the measurement took is the cache's now.
    torch.cuda.empty_cache()
    figures = f"{min_bytes >> 20} MB: {copied:.0f} µs, {kind} {other:.0f}"
    if not is_right:
        _logger.warning("large sums by copies between GPUs came out wrong, so they are left to %s", kind)
        return f"{kind}: large sums by copies came out wrong"
    if copied > other * _PATIENCE:
        return f"{kind}: it is faster ({figures})"
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


def _is_right(
    reducer: CopyReducer, group: GroupCoordinator, num_rows: int, row_size: int, device: torch.device
) -> bool:
    """Two calls at a time, of numbers that every rank knows of all ranks, whose sums are exact in bf16."""
    size, rank = group.world_size, group.rank_in_group
    indices = torch.arange(num_rows * row_size, dtype=torch.int32, device=device).view(num_rows, row_size)
    right = True
    for turn in range(2 * NUM_SLOTS):
        parts = [((indices * (each + 3) + each + turn) % 17 - 8).bfloat16() for each in range(size)]
        expected = torch.stack(parts).float().sum(0).bfloat16()
        stream = torch.full_like(parts[0], turn - 3)
        pending = [reducer.start(parts[rank].clone())]
        pending.append(reducer.start_add_norm(-parts[rank], stream[reducer.own_rows(num_rows)], None, 0.0))
        right = right and torch.equal(pending[0].wait(), expected)
        right = right and torch.equal(pending[1].wait(), stream - expected)
    return right


def _time(start: Callable[[torch.Tensor], PendingSum], x: torch.Tensor) -> float:
    """Microseconds of one of several calls in a row: the best of some repeats."""
    best = float("inf")
    for _ in range(_REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The ranks wait for each other in the first.
        start(x).wait()
        begin.record()
        for _ in range(_CALLS):
            start(x).wait()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e3 / _CALLS)
    return best
