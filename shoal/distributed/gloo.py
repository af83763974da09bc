"""Collectives between CPU ranks over TCP, through torch's Gloo process group. `rendezvous` makes it.

The group is made directly from a store, not through torch.distributed's global state: several engines, or none, may
live in one process.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import distributed_c10d as c10d

from shoal.distributed.communicator import DeviceCommunicator, Transfer, tree_sum
from shoal.errors import CollectiveError, StartupError

_HALF_TYPES = (torch.bfloat16, torch.float16)
# Up to this many ranks, gathering halves and adding them moves no more bytes than a ring of fp32.
_MOST_GATHERED = 4
_TAG = 0


class GlooCommunicator(DeviceCommunicator):
    """Its constructor connects to all ranks, which must all construct it; it may block, at most `connect_timeout`."""

    kind = "Gloo"

    def __init__(
        self,
        store: Any,
        rank: int,
        names: Sequence[str],
        *,
        address: str,
        timeout: float,
        connect_timeout: float,
    ) -> None:
        """store: a torch.distributed Store of this group's own prefix. address: where the others reach this rank.

        Raises StartupError when a rank cannot be reached.
        """
        super().__init__(rank, names, torch.device("cpu"), timeout)
        try:
            from torch.distributed import ProcessGroupGloo
        except ImportError as error:
            raise StartupError("this build of torch has no Gloo; install one with torch.distributed") from error
        try:
            options = ProcessGroupGloo._Options()
            options._devices = [ProcessGroupGloo.create_device(hostname=address)]
            options._timeout = datetime.timedelta(seconds=connect_timeout)
            self._group = ProcessGroupGloo(store, rank, self.size, options)
            self._group._set_default_timeout(datetime.timedelta(seconds=timeout))
        except RuntimeError as error:
            raise StartupError(
                f"{names[rank]} could not connect over {address} to all of {', '.join(names)}: {error}"
            ) from error

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        if not x.numel():
            return x
        if x.dtype in _HALF_TYPES and self.size <= _MOST_GATHERED:
            return tree_sum(list(self.all_gather(x)), out=x)
        wide = x.float() if x.dtype in _HALF_TYPES else x
        self._finish(self._call("all_reduce", self._group.allreduce, [wide]), "all_reduce")
        return x if wide is x else x.copy_(wide)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        output = x.new_empty((self.size, *x.shape))
        if x.numel():
            flat = output.view(-1)
            work = self._call("all_gather", self._group._allgather_base, flat, x.contiguous().view(-1))
            self._finish(work, "all_gather")
        return output

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        # Gloo has a reduce-scatter for some types and sizes only; its all-reduce takes all.
        return self.all_reduce(x.clone(memory_format=torch.contiguous_format))[self.rank].clone()

    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        x = x.contiguous()
        if x.numel():
            self._finish(self._call("broadcast", self._group.broadcast, x, source), "broadcast")
        return x

    def gather(self, x: torch.Tensor, destination: int) -> torch.Tensor | None:
        output = x.new_empty((self.size, *x.shape)) if self.rank == destination else None
        if x.numel():
            outputs = [] if output is None else [list(output)]
            options = c10d.GatherOptions()
            options.rootRank = destination
            work = self._call("gather", self._group.gather, outputs, [x.contiguous()], options)
            self._finish(work, "gather")
        return output

    def isend(self, x: torch.Tensor, destination: int) -> Transfer:
        if not x.numel():
            return Transfer()
        data = x.contiguous()
        work = self._call("send", self._group.send, [data], destination, _TAG)

        def finish() -> torch.Tensor:
            self._finish(work, "send")
            return data  # held until the bytes are gone

        return Transfer(finish)

    def recv(self, x: torch.Tensor, source: int) -> torch.Tensor:
        if x.numel():
            self._finish(self._call("recv", self._group.recv, [x], source, _TAG), "recv")
        return x

    def barrier(self) -> None:
        self._finish(self._call("barrier", self._group.barrier), "barrier")

    def close(self) -> None:
        self._group = None

    def _call(self, what: str, method: Any, *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except RuntimeError as error:
            raise self._lost(what, error) from error

    def _finish(self, work: Any, what: str) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost(what, error) from error

    def _lost(self, what: str, error: RuntimeError) -> CollectiveError:
        """Gloo says "connection closed by peer [address]" of an ended rank, "timed out" of one that does not come."""
        reason = re.sub(r"^\[[^\]]*\] ", "", str(error).split("\n")[0]).split(". This is")[0].strip()
        others = ", ".join(name for rank, name in enumerate(self.names) if rank != self.rank)
        return CollectiveError(f"{self.names[self.rank]} is in {what} with {others}: {reason}")
