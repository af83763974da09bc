"""A set of ranks that work together, and how this rank talks to the others. Layers, runner and executor hold one.

At world size 1 everything returns its input and nothing of torch.distributed is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from shoal.distributed.communicator import (
    DeviceCommunicator,
    LargeReducer,
    PendingSum,
    SmallReducer,
    Transfer,
    tree_sum,
)
from shoal.distributed.status import GROUPS, OPERATIONS, StatusBoard, StatusRecord, describe_stall
from shoal.distributed.symmetric_memory import PeerMemory
from shoal.distributed.tensor_dict import FIRST_BYTES, DictSpec, describe, pack, rest_bytes, unpack
from shoal.errors import CollectiveError

(
    _,
    _ALL_REDUCE,
    _ALL_REDUCE_TREE,
    _ALL_GATHER,
    _REDUCE_SCATTER,
    _BROADCAST,
    _GATHER,
    _BARRIER,
    _SEND,
    _RECV,
) = range(len(OPERATIONS))


class GroupCoordinator:
    """Collectives of one group. All its ranks make the same calls in the same order, from one thread each.

    Wherever a method takes a rank (source, destination) it is the position in the group, as `rank_in_group` is.
    A method that fails raises CollectiveError; the group is of no more use then.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        communicator: DeviceCommunicator | None = None,
        *,
        host: DeviceCommunicator | None = None,
        name: str = "world",
        status: StatusRecord | None = None,
        board: StatusBoard | None = None,
        memory: PeerMemory | None = None,
    ) -> None:
        """
        ranks: global ranks, in the order of the group. rank: this one's global rank.
        communicator: None for a group of one. host: between the same ranks for tensors in host memory, where
        `communicator` is a device's own; without it such a group has no tensor dicts.
        name: one of status.GROUPS. status, board: this rank's record, and where the others' are read after a failure.
        memory: of the ranks' GPUs, mapped in all of them, for a SmallReducer that somebody makes and attaches.
        """
        if rank not in ranks:
            raise ValueError(f"rank {rank} is not in the group of ranks {list(ranks)}")
        if len(ranks) > 1 and (communicator is None or communicator.size != len(ranks)):
            raise ValueError(f"a group of {len(ranks)} ranks needs a communicator of as many")
        self.ranks = tuple(ranks)
        self.rank = rank
        self.name = name
        self.communicator = communicator
        self.memory = memory
        self.reducer: SmallReducer | None = None
        self.large_reducer: LargeReducer | None = None
        # Set by whoever measured it: a sum takes less than computing in two halves to hide it would cost.
        self.sums_are_quick = False
        self._host = host or (communicator if communicator is None or communicator.device.type == "cpu" else None)
        self._index = GROUPS.index(name)
        self._status = status
        self._board = board

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def rank_in_group(self) -> int:
        return self.ranks.index(self.rank)

    @property
    def next_rank(self) -> int:
        """The rank after this one, in a ring."""
        return (self.rank_in_group + 1) % self.world_size

    @property
    def previous_rank(self) -> int:
        """The rank before this one, in a ring."""
        return (self.rank_in_group - 1) % self.world_size

    def communicators(self) -> list[DeviceCommunicator]:
        """What this group talks through: to be closed by whoever made them, once; groups may share them."""
        return [each for each in dict.fromkeys((self.communicator, self._host)) if each is not None]

    def attach(self, reducer: SmallReducer | None) -> None:
        """Sum and gather what `reducer` takes through it from now on. All ranks do so at the same point, or none."""
        self.reducer = reducer

    def attach_large(self, reducer: LargeReducer) -> None:
        """Let `start_all_reduce` sum what `reducer` takes through it from now on. All ranks do so at the same point."""
        self.large_reducer = reducer

    # --- collectives of tensors --------------------------------------------------------------------------------

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x [...] -> the sum over all ranks [...], in x where x is contiguous: use what is returned.

        On the CPU of one host the order of summation is fixed (a tree by rank), and halves are summed in fp32; so are
        tensors that a SmallReducer takes, in the order of the ranks.
        """
        if self.communicator is None:
            return x
        self._enter(_ALL_REDUCE)
        if self.reducer is not None and self.reducer.takes(x):
            return self._leave(self.reducer.all_reduce(x))
        try:
            x = self.communicator.all_reduce(x)
        except CollectiveError as error:
            raise self._explained(error) from error
        return self._leave(x)

    def overlaps(self, x: torch.Tensor) -> bool:
        """Whether a sum of x that `start_all_reduce` began goes on while this rank computes, and is worth the while.
        All ranks answer alike."""
        if (large := self.large_reducer) is not None and (large.takes(x) or large.takes_rows(x)):
            return True
        return self.communicator is not None and self.communicator.overlaps and not self.sums_are_quick

    def start_all_reduce(self, x: torch.Tensor) -> PendingSum:
        """As `all_reduce`, but beside what this rank does next: leave x alone until `wait` of what is returned.

        Sums are waited for in the order in which they were begun, and used before the next but one is begun: its memory
        may be the same.
        """
        if self.communicator is None:
            return PendingSum(x)
        self._enter(_ALL_REDUCE)
        if self.large_reducer is not None and self.large_reducer.takes(x):
            return self._leave(self.large_reducer.start(x))
        try:
            pending = self.communicator.start_all_reduce(x)
        except CollectiveError as error:
            raise self._explained(error) from error
        return self._leave(pending)

    def rows_of_stream(self, summand: torch.Tensor) -> slice | None:
        """Which rows of a residual stream `start_all_reduce_add_norm` needs of this rank beside a summand [T, H]; None
        where it does not serve."""
        reducer = self.large_reducer
        return reducer.own_rows(summand.shape[0]) if reducer is not None and reducer.takes_rows(summand) else None

    def start_all_reduce_add_norm(
        self, summand: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
    ) -> PendingSum:
        """As `start_all_reduce`, of RMSNorm(total), total = the ranks' summands [T, H] + residual; see LargeReducer."""
        assert self.large_reducer is not None
        self._enter(_ALL_REDUCE)
        return self._leave(self.large_reducer.start_add_norm(summand, residual, weight, eps))

    def all_reduce_add_norm(
        self,
        summand: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        add_norm: Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(RMSNorm(total), total) [T, H] of total = the ranks' summands [T, H] + residual [T, H], weight [H].

        All ranks have the same residual. In one kernel where a SmallReducer takes the summand, the total rounded once;
        else the sum is rounded first, and given with the residual to add_norm, by default plain torch. The summand may
        be overwritten.
        """
        if self.communicator is not None and self.reducer is not None and self.reducer.takes_rows(summand):
            self._enter(_ALL_REDUCE)
            return self._leave(self.reducer.all_reduce_add_norm(summand, residual, weight, eps))
        total = self.all_reduce(summand)
        if add_norm is not None:
            return add_norm(total, residual)
        total = total if residual is None else total + residual
        return F.rms_norm(total, (total.shape[-1],), weight, eps), total

    def agree(self, mine: bool) -> bool:
        """Whether it is so on all ranks; all have come then."""
        if self.communicator is None:
            return mine
        votes = self.all_reduce(torch.tensor([int(mine)], dtype=torch.int64, device=self.communicator.device))
        return int(votes.item()) == self.world_size

    def all_reduce_tree(self, partials: torch.Tensor) -> torch.Tensor:
        """partials [shards, ...] -> the sum over the shards of all ranks [...], as one tree of neighbours.

        Rank r holds shards r·k to (r+1)·k − 1, k a power of two. The bits depend on the number of shards in all, not
        on the number of ranks that hold them, when partials are fp32 (a half is rounded once per rank).
        """
        num_shards = partials.shape[0]
        if num_shards == 0 or num_shards & (num_shards - 1):
            raise ValueError(f"a rank's shards must be a power of two to be a part of the tree; got {num_shards}")
        # A node of the whole tree: the others need no more than that.
        mine = tree_sum(partials.unbind(0))
        if self.communicator is None:
            return mine
        self._enter(_ALL_REDUCE_TREE)
        try:
            total = self.communicator.all_reduce_tree(mine)
        except CollectiveError as error:
            raise self._explained(error) from error
        return self._leave(total)

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Every rank's x, of one shape, side by side along `dim`: that dimension grows by world_size."""
        if self.communicator is None:
            return x
        self._enter(_ALL_GATHER)
        if self.reducer is not None and self.reducer.takes_gather(x):
            return self._leave(_side_by_side(self.reducer.all_gather(x), dim))
        try:
            parts = self.communicator.all_gather(x)
        except CollectiveError as error:
            raise self._explained(error) from error
        return self._leave(_side_by_side(parts, dim))

    def reduce_scatter(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's part, along `dim`, of the sum over all ranks. ValueError if `dim` does not divide evenly."""
        if self.communicator is None:
            return x
        if x.shape[dim] % self.world_size:
            raise ValueError(f"dimension {dim} of {tuple(x.shape)} does not divide by {self.world_size} ranks")
        self._enter(_REDUCE_SCATTER)
        try:
            part = self.communicator.reduce_scatter(torch.stack(x.chunk(self.world_size, dim)))
        except CollectiveError as error:
            raise self._explained(error) from error
        return self._leave(part)

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """x of rank `source`, on all ranks, in x where x is contiguous. All know type and shape."""
        if self.communicator is None:
            return x
        self._enter(_BROADCAST)
        try:
            x = self._for(x).broadcast(x, source)
        except CollectiveError as error:
            raise self._explained(error) from error
        return self._leave(x)

    def gather(self, x: torch.Tensor, destination: int = 0, dim: int = -1) -> torch.Tensor | None:
        """As `all_gather`, on rank `destination` alone; None elsewhere."""
        if self.communicator is None:
            return x
        self._enter(_GATHER)
        try:
            parts = self.communicator.gather(x, destination)
        except CollectiveError as error:
            raise self._explained(error) from error
        return self._leave(None if parts is None else _side_by_side(parts, dim))

    def barrier(self) -> None:
        """Return when all ranks have come here. On a device it says nothing about work queued there."""
        communicator = self._host or self.communicator
        if communicator is None:
            return
        self._enter(_BARRIER)
        try:
            communicator.barrier()
        except CollectiveError as error:
            raise self._explained(error) from error
        self._leave(None)

    # --- one rank to another -----------------------------------------------------------------------------------

    def send(self, x: torch.Tensor, destination: int | None = None) -> None:
        """Send x to a rank, the next by default; it calls `recv` with the same type and shape."""
        self.isend(x, destination).wait()

    def isend(self, x: torch.Tensor, destination: int | None = None) -> Transfer:
        """As `send`, but x may be still on its way when this returns: keep it unchanged until `wait` has returned."""
        destination = self._other(destination, self.next_rank)
        self._enter(_SEND, destination)
        try:
            transfer = self._for(x).isend(x, destination)
        except CollectiveError as error:
            raise self._explained(error) from error
        self._leave(None)
        return Transfer(lambda: self._finish(transfer, destination), goes_on_alone=transfer.goes_on_alone)

    def recv(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        source: int | None = None,
        *,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """The next tensor from a rank, the previous by default. device: the group's own if None."""
        source = self._other(source, self.previous_rank)
        x = torch.empty(tuple(shape), dtype=dtype, device=device or self._communicator().device)
        return self._recv_into(x, source)

    def send_tensor_dict(self, entries: Mapping[str, Any], destination: int | None = None) -> None:
        """Send tensors and plain values (None, bool, int, float, str, bytes, list, dict) by name. See `isend`."""
        self.isend_tensor_dict(entries, destination).wait()

    def isend_tensor_dict(self, entries: Mapping[str, Any], destination: int | None = None) -> Transfer:
        messages = [message for message in pack(describe(entries)) if message.numel()]
        tensors = [value for value in entries.values() if isinstance(value, torch.Tensor)]
        self._host_communicator()
        transfers = [self.isend(x, destination) for x in messages + tensors]

        def finish() -> None:
            for transfer in transfers:
                transfer.wait()

        return Transfer(finish, goes_on_alone=all(transfer.goes_on_alone for transfer in transfers))

    def recv_tensor_dict(self, source: int | None = None) -> dict[str, Any]:
        """What a rank, the previous by default, sent: tensors on the group's device or in host memory, as they were."""
        source = self._other(source, self.previous_rank)
        host = self._host_communicator()
        first = self._recv_into(torch.empty(FIRST_BYTES, dtype=torch.uint8, device=host.device), source)
        rest = self._recv_into(torch.empty(rest_bytes(first), dtype=torch.uint8, device=host.device), source)
        spec = unpack(first, rest)
        device = self._communicator().device
        return _in_order(spec, {name: self._recv_into(x.empty(device), source) for name, x in spec.tensors.items()})

    def broadcast_tensor_dict(self, entries: Mapping[str, Any] | None, source: int = 0) -> dict[str, Any]:
        """What rank `source` gives, on all ranks; the others give None."""
        if self.communicator is None:
            return dict(entries or {})
        host = self._host_communicator()
        if self.rank_in_group == source:
            assert entries is not None, "the source of a broadcast must give something"
            first, rest = pack(describe(entries))
            for message in (first, rest):
                self.broadcast(message, source)
            return {
                name: self.broadcast(value, source) if isinstance(value, torch.Tensor) else value
                for name, value in entries.items()
            }
        first = self.broadcast(torch.empty(FIRST_BYTES, dtype=torch.uint8, device=host.device), source)
        rest = self.broadcast(torch.empty(rest_bytes(first), dtype=torch.uint8, device=host.device), source)
        spec = unpack(first, rest)
        device = self.communicator.device
        return _in_order(spec, {name: self.broadcast(x.empty(device), source) for name, x in spec.tensors.items()})

    # --- inside ------------------------------------------------------------------------------------------------

    def _finish(self, transfer: Transfer, destination: int) -> None:
        self._enter(_SEND, destination)
        try:
            transfer.wait()
        except CollectiveError as error:
            raise self._explained(error) from error
        self._leave(None)

    def _recv_into(self, x: torch.Tensor, source: int) -> torch.Tensor:
        self._enter(_RECV, source)
        try:
            x = self._for(x).recv(x, source)
        except CollectiveError as error:
            raise self._explained(error) from error
        return self._leave(x)

    def _for(self, x: torch.Tensor) -> DeviceCommunicator:
        """The communicator for where x is."""
        communicator = self._communicator()
        return communicator if x.device.type == communicator.device.type else self._host_communicator()

    def _communicator(self) -> DeviceCommunicator:
        if self.communicator is None:
            raise ValueError(f"rank {self.rank} is alone in its {self.name} group: there is no other rank to talk to")
        return self.communicator

    def _host_communicator(self) -> DeviceCommunicator:
        if self._host is None:
            raise ValueError(f"the {self.name} group of rank {self.rank} has no communicator for host memory")
        return self._host

    def _other(self, rank: int | None, default: int) -> int:
        rank = default if rank is None else rank
        if not 0 <= rank < self.world_size or rank == self.rank_in_group:
            raise ValueError(
                f"{rank} is no other rank of the {self.name} group of {self.world_size}; this one is "
                f"{self.rank_in_group}"
            )
        return rank

    def _enter(self, operation: int, peer: int | None = None) -> None:
        if self._status is not None:
            self._status.enter(self._index, operation, -1 if peer is None else self.ranks[peer])

    def _leave(self, result: Any) -> Any:
        if self._status is not None:
            self._status.leave(self._index)
        return result

    def _explained(self, error: CollectiveError) -> CollectiveError:
        """The status record keeps saying that this rank is inside: others read it there."""
        if self._board is None:
            return error
        return CollectiveError(f"{error} ({describe_stall(self._board.read())})")


def _side_by_side(parts: torch.Tensor, dim: int) -> torch.Tensor:
    """parts [ranks, ...] -> [...] with `dim` grown by ranks."""
    dim = dim % (parts.ndim - 1)
    shape = list(parts.shape[1:])
    shape[dim] *= parts.shape[0]
    return parts.movedim(0, dim).reshape(shape)


def _in_order(spec: DictSpec, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensors[name] if name in tensors else spec.values[name] for name in spec.names}
