"""One rank of an all-reduce that is tried before a model is started: `python -m shoal.distributed.trial ORDER`.

The doctor starts one for each rank, in processes of their own, and ends them at its deadline. ORDER is JSON; what came
of it is printed as one line of JSON. The communicators are those that a model's ranks would use.
"""

from __future__ import annotations

import functools
import os
import sys
import time

import msgspec
import torch

from shoal.distributed.communicator import DeviceCommunicator
from shoal.distributed.gloo import GlooCommunicator
from shoal.distributed.meeting import Meeting, tcp_store
from shoal.distributed.nccl import NcclCommunicator
from shoal.errors import ShoalError
from shoal.messages import TrialOrder

_NUM_TIMES = 2


class TrialResult(msgspec.Struct):
    """error: "" when it worked. seconds: for one all-reduce of num_bytes, at best."""

    error: str = ""
    seconds: float = 0.0
    num_bytes: int = 0


def run(order: TrialOrder) -> TrialResult:
    size = len(order.names)
    store = tcp_store(order.master_address, order.master_port, order.rank, order.timeout)
    names = dict(enumerate(order.names))
    meeting = Meeting(store, order.rank, size, timeout=order.timeout, generation=0, names=names)
    meeting.arrive(order.address, {})
    communicator: DeviceCommunicator = meeting.run(
        f"connect with {order.backend}", lambda: _connect(order, meeting), range(size)
    )
    device = torch.device("cuda", order.local_rank) if order.backend == "nccl" else torch.device("cpu")
    best = float("inf")
    for number in range(_NUM_TIMES):
        x = torch.full((order.num_bytes // 4,), float(order.rank + 1), device=device)
        total, seconds = meeting.run(f"all-reduce {number}", functools.partial(_sum, communicator, x), range(size))
        best = min(best, seconds)
        if total != float(size * (size + 1) // 2):
            raise meeting.fail(f"an all-reduce of 1 to {size} came to {total}")
    # Rank 0 serves the store, so it goes last.
    if order.rank == 0:
        meeting.exchange("end", "")
    else:
        meeting.store.set(f"end/{order.rank}", "")
    return TrialResult(seconds=best, num_bytes=order.num_bytes)


def _connect(order: TrialOrder, meeting: Meeting) -> DeviceCommunicator:
    store = torch.distributed.PrefixStore("trial", meeting.store)
    if order.backend == "nccl":
        device = torch.device("cuda", order.local_rank)
        return NcclCommunicator(store, order.rank, order.names, device=device, timeout=order.timeout, both_ways=False)
    return GlooCommunicator(
        store,
        order.rank,
        order.names,
        address=order.address,
        timeout=order.timeout,
        connect_timeout=order.timeout,
    )


def _sum(communicator: DeviceCommunicator, x: torch.Tensor) -> tuple[float, float]:
    """The last element of the sum, and the seconds that it took."""
    start = time.perf_counter()
    last = float(communicator.all_reduce(x)[-1].item())
    return last, time.perf_counter() - start


def main() -> None:
    order = msgspec.json.decode(sys.argv[1], type=TrialOrder)
    try:
        result = run(order)
    except ShoalError as error:
        result = TrialResult(error=str(error))
    print(msgspec.json.encode(result).decode(), flush=True)
    # A communicator that lost a rank may wait at the interpreter's end.
    os._exit(bool(result.error))


if __name__ == "__main__":
    main()
