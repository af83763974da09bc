"""Collectives between CUDA ranks, through torch's NCCL process group. `rendezvous` makes it.

Operations are queued on the current stream and return at once: a lost rank shows as a step that does not end, which
the executor sees, or as NCCL's own watchdog ending the process after `timeout`.

Whoever ends a group calls `close`, after deleting the CUDA graphs that hold its operations: torch's own destructor of a
group that is still connected was seen to wait for ever (2.11).
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import distributed_c10d as c10d

from shoal import env
from shoal.distributed.communicator import DeviceCommunicator, PendingSum, Transfer
from shoal.errors import CollectiveError, StartupError

_TAG = 0
_QUIET = {
    # It advises a group for each direction, which is what `both_ways` makes.
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "false",
    # torch's own watch over its watch asks the store at all times, and complains at the end, when rank 0 goes first.
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


class NcclCommunicator(DeviceCommunicator):
    """Its constructor connects to all ranks, which must all construct it; it may block: the caller keeps the deadline.

    NCCL sums bf16 and fp16 in its own order, rounding on the way.
    """

    kind = "NCCL"
    overlaps = True

    def __init__(
        self,
        store: Any,
        rank: int,
        names: Sequence[str],
        *,
        device: torch.device,
        timeout: float,
        both_ways: bool,
    ) -> None:
        """
        store: a torch.distributed Store of this group's own prefix. StartupError when NCCL does not connect.
        both_ways: a group of pipeline stages. Sends to lower ranks get a connection of their own: without it, two ranks
        that each send much before they receive wait for each other for ever, as NCCL runs the sends and receives of one
        connection in turn. So do sends from ranks of odd number: a stage receives while what it sent is not taken yet.
        """
        super().__init__(rank, names, device, timeout)
        try:
            from torch.distributed import ProcessGroupNCCL
        except ImportError as error:
            raise StartupError("this build of torch has no NCCL; install a CUDA build, or use the CPU") from error
        try:
            with torch.cuda.device(device):
                for name, value in _QUIET.items():
                    env.set_default(name, value)
                options = ProcessGroupNCCL.Options()
                options._timeout = datetime.timedelta(seconds=timeout)

                def connect(prefix: str) -> Any:
                    group = ProcessGroupNCCL(torch.distributed.PrefixStore(prefix, store), rank, self.size, options)
                    # Now, and not within the first step.
                    group.eager_connect_single_device(device)
                    return group

                self._group = self._odd = self._downward = connect("all")
                if both_ways:
                    self._downward = connect("downward")
                    self._odd = connect("odd") if self.size > 2 else self._group
                    self._connect_stages()
        except RuntimeError as error:
            raise StartupError(f"{names[rank]}: NCCL on {device} did not connect: {error}") from error

    def _connect_stages(self) -> None:
        """Send a first number from each stage to the next, and from the last one to the first.

        NCCL connects two ranks when they first talk, and blocks the host of whoever comes first until the other makes
        the matching call: two ranks that both begin with a send would wait for ever.
        """
        pairs = [(rank, rank + 1) for rank in range(self.size - 1)] + [(self.size - 1, 0)]
        number = torch.zeros(1, device=self.device)
        for source, destination in pairs:
            if self.rank == source:
                self.isend(number, destination).wait()
            elif self.rank == destination:
                self.recv(number, source)
        torch.cuda.synchronize(self.device)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        if x.numel():
            options = c10d.AllreduceOptions()
            options.asyncOp = False
            self._wait("all_reduce", self._group.allreduce, [x], options)
        return x

    def start_all_reduce(self, x: torch.Tensor) -> PendingSum:
        """On NCCL's own stream, after what is queued on the current one."""
        x = x.contiguous()
        if not x.numel():
            return PendingSum(x)
        options = c10d.AllreduceOptions()
        options.asyncOp = True
        work = self._call("all_reduce", self._group.allreduce, [x], options)
        return PendingSum(x, work.wait)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        output = x.new_empty((self.size, *x.shape))
        if x.numel():
            options = c10d.AllgatherOptions()
            options.asyncOp = False
            self._wait("all_gather", self._group._allgather_base, output, x.contiguous(), options)
        return output

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        output = x.new_empty(x.shape[1:])
        if output.numel():
            options = c10d.ReduceScatterOptions()
            options.asyncOp = False
            self._wait("reduce_scatter", self._group._reduce_scatter_base, output, x.contiguous(), options)
        return output

    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        x = x.contiguous()
        if x.numel():
            options = c10d.BroadcastOptions()
            options.rootRank, options.rootTensor, options.asyncOp = source, 0, False
            self._wait("broadcast", self._group.broadcast, [x], options)
        return x

    def gather(self, x: torch.Tensor, destination: int) -> torch.Tensor | None:
        output = x.new_empty((self.size, *x.shape)) if self.rank == destination else None
        if x.numel():
            outputs = [] if output is None else [list(output)]
            options = c10d.GatherOptions()
            options.rootRank, options.asyncOp = destination, False
            self._wait("gather", self._group.gather, outputs, [x.contiguous()], options)
        return output

    def isend(self, x: torch.Tensor, destination: int) -> Transfer:
        """The send runs on a stream of its own; `wait` makes the current stream wait for it, not the host."""
        if not x.numel():
            return Transfer()
        data = x.contiguous()
        work = self._call("send", self._between(self.rank, destination).send, [data], destination, _TAG)

        def finish() -> torch.Tensor:
            work.wait()
            return data

        return Transfer(finish)

    def recv(self, x: torch.Tensor, source: int) -> torch.Tensor:
        if x.numel():
            self._wait("recv", self._between(source, self.rank).recv, [x], source, _TAG)
        return x

    def barrier(self) -> None:
        """Waits on the host too."""
        self.all_reduce(torch.zeros(1, device=self.device))
        torch.cuda.current_stream(self.device).synchronize()

    def close(self) -> None:
        """Ends the communicator without asking the others, which may be gone."""
        groups = dict.fromkeys((self._group, self._odd, self._downward))
        self._group = self._odd = self._downward = None
        for group in groups:
            if group is not None:
                group.abort()

    def _between(self, source: int, destination: int) -> Any:
        if source > destination:
            return self._downward
        return self._odd if source % 2 else self._group

    def _wait(self, what: str, method: Any, *arguments: Any) -> None:
        work = self._call(what, method, *arguments)
        if work is not None:
            work.wait()

    def _call(self, what: str, method: Any, *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except RuntimeError as error:
            raise CollectiveError(f"{self.names[self.rank]} is in {what}: {error}") from error
