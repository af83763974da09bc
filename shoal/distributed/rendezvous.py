"""Forms the groups of the rank grid on this rank, each phase with a deadline. Workers call `form_groups` once.

A group of one costs nothing. On CUDA a group takes NCCL, and for host memory what CPU ranks take; CPU ranks take
shared memory when all of them are on one host (x86-64), else Gloo. GPUs of one host that share layers also map each
other's memory.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from shoal import log
from shoal.distributed.communicator import DeviceCommunicator
from shoal.distributed.gloo import GlooCommunicator
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.meeting import Meeting, file_store, tcp_store
from shoal.distributed.nccl import NcclCommunicator
from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.segment import Segment
from shoal.distributed.shared_memory import Layout, SharedMemoryCommunicator
from shoal.distributed.signals import MAX_RANKS, supported
from shoal.distributed.status import GROUPS, RankStatus, StatusBoard, StatusRecord
from shoal.distributed.symmetric_memory import MAX_RANKS as MAX_GPUS
from shoal.distributed.symmetric_memory import PeerMemory, share_memory
from shoal.errors import CollectiveError, ConfigError

_logger = log.get_logger(__name__)


class ParallelGroups:
    """This rank's groups. `status` is this rank's record, to which the worker writes step, phase and layer."""

    def __init__(
        self,
        dims: ParallelDims,
        groups: Mapping[str, GroupCoordinator],
        status: StatusRecord,
        board: StatusBoard | None = None,
        store: Any = None,
        meeting: Meeting | None = None,
    ) -> None:
        self.dims = dims
        self.world = groups["world"]
        self.tensor = groups["tensor"]
        self.pipeline = groups["pipeline"]
        self.data = groups["data"]
        self.status = status
        self._board = board
        self._meeting = meeting
        self._store = store  # rank 0 serves it: NCCL may ask it for as long as the groups live

    def host_status(self) -> list[RankStatus]:
        """The records of this host's ranks, for `status.describe_stall`; those of other hosts come from there."""
        return self._board.read() if self._board is not None else []

    @property
    def status_address(self) -> str | None:
        """Where another process of this host opens the records (`StatusBoard.open`); None where there are none."""
        return self._board.address if self._board is not None else None

    def meet(self, phase: str) -> None:
        """Wait for all ranks, as long as a phase of the start may take: where they come too far apart for a collective.

        Raises StartupError, which names those who have not come.
        """
        if self._meeting is not None:
            self._meeting.exchange(phase, "")

    def share_memory(self, num_bytes: int) -> PeerMemory | None:
        """More memory that the ranks of the tensor group have mapped, like `tensor.memory`: num_bytes, zeros.

        All of them call it; None on all of them where that does not work.
        """
        group = self.tensor
        if self._meeting is None or group.memory is None:
            return None
        label, device = f"tensor-{group.ranks[0]} for large sums", group.memory.device
        return share_memory(self._meeting, label, group.ranks, group.rank, device, num_bytes=num_bytes, word=0)

    def close(self) -> None:
        """End the groups on this rank, without asking the others. May be called twice."""
        groups = (self.world, self.tensor, self.pipeline, self.data)
        for communicator in {id(each): each for group in groups for each in group.communicators()}.values():
            communicator.close()
        self.status.update(phase="end")
        self._meeting = self._store = None


def single_rank_groups(dims: ParallelDims | None = None) -> ParallelGroups:
    """The groups of one rank alone: no store, no torch.distributed, nothing to wait for."""
    dims = dims or ParallelDims()
    if dims.world_size != 1:
        raise ValueError(f"one rank alone has no groups of a grid of {dims.world_size}")
    # On a board all the same, where there can be one: the node's daemon reads it there.
    board = StatusBoard.create(1) if sys.platform == "linux" else None
    status = board.record(dims, 0) if board is not None else StatusRecord(dims)
    return ParallelGroups(dims, {name: GroupCoordinator([0], 0, name=name) for name in GROUPS}, status, board)


def form_groups(
    dims: ParallelDims,
    *,
    device: torch.device,
    address: str,
    master_address: str | None = None,
    master_port: int | None = None,
    store: Any = None,
    store_file: str | None = None,
    startup_timeout: float = 300.0,
    timeout: float = 60.0,
    generation: int = 0,
    facts: Mapping[str, str] | None = None,
    names: Mapping[int, str] | None = None,
) -> ParallelGroups:
    """Meet the other ranks of the grid and connect to those of this rank's groups.

    address: of this host, where the other ranks reach this one. Chosen by the caller; no host name is resolved here.
    master_address, master_port: where rank 0 serves the store; or `store` (a torch Store), or `store_file` (one host).
    startup_timeout: seconds for each phase of the start. timeout: seconds for one operation later.
    generation: of the engine; ranks of another one that use the same store are not seen.
    facts: what must be equal on all ranks (versions, a digest of the config), by name.
    names: how to call ranks that have not come ("rank 3 (on node-b, 10.0.0.4)").

    Raises StartupError: who did not come in which phase, who did and from where; or which fact differs.
    """
    if dims.world_size == 1:
        return single_rank_groups(dims)
    store = _store(dims, store, store_file, master_address, master_port, startup_timeout)
    meeting = Meeting(
        store, dims.rank, dims.world_size, timeout=startup_timeout, generation=generation, names=names or {}
    )
    meeting.arrive(address, facts or {})
    board, status = _status_board(meeting, dims)
    status.update(generation=generation, phase="rendezvous")
    builder = _Builder(meeting, dims, device, address, timeout)
    groups = {}
    for name in GROUPS:
        ranks = dims.group(name)
        communicator, host = builder.build(name, ranks) if len(ranks) > 1 else (None, None)
        groups[name] = GroupCoordinator(
            ranks,
            dims.rank,
            communicator,
            host=host,
            name=name,
            status=status,
            board=board,
            memory=builder.share(ranks) if name == "tensor" and len(ranks) > 1 else None,
        )
    parallel = ParallelGroups(dims, groups, status, board, store, meeting)
    _first_collectives(meeting, parallel, device)
    return parallel


def _store(
    dims: ParallelDims, store: Any, store_file: str | None, address: str | None, port: int | None, timeout: float
) -> Any:
    if store is not None:
        return store
    if store_file is not None:
        return file_store(store_file, dims.world_size)
    if address is None or port is None:
        raise ConfigError("ranks need a place to meet: a master address and port, a store, or a store file")
    return tcp_store(address, port, dims.rank, timeout)


def _status_board(meeting: Meeting, dims: ParallelDims) -> tuple[StatusBoard, StatusRecord]:
    """One board a host, made by its first rank."""
    me = meeting.peers[dims.rank].host_identity
    ranks = [rank for rank, peer in sorted(meeting.peers.items()) if peer.host_identity == me]
    board = StatusBoard.create(len(ranks)) if dims.rank == ranks[0] else None
    addresses = meeting.exchange("status", board.address if board else "", ranks)
    if board is None:
        try:
            board = StatusBoard.open(addresses[ranks[0]])
        except OSError as error:
            raise meeting.fail(_cannot_share(meeting, dims.rank, ranks[0], error)) from error
    return board, board.record(dims, ranks.index(dims.rank))


class _Builder:
    """Makes communicators; groups of the same ranks share one."""

    def __init__(
        self, meeting: Meeting, dims: ParallelDims, device: torch.device, address: str, timeout: float
    ) -> None:
        self._meeting = meeting
        self._dims = dims
        self._rank = dims.rank
        self._device = device
        self._address = address
        self._timeout = timeout
        self._built: dict[tuple[int, ...], tuple[DeviceCommunicator, DeviceCommunicator]] = {}

    def build(self, name: str, ranks: Sequence[int]) -> tuple[DeviceCommunicator, DeviceCommunicator]:
        """The group's communicator for tensors on its device, and the one for host memory (on a CPU, the same)."""
        key = tuple(ranks)
        if key not in self._built:
            host = self._host_communicator(f"{name}-{ranks[0]}", ranks)
            communicator = self._nccl(f"{name}-{ranks[0]}", ranks) if self._device.type == "cuda" else host
            self._built[key] = communicator, host
            _logger.debug("%s group of ranks %s: %s", name, list(ranks), communicator.kind)
        return self._built[key]

    def share(self, ranks: Sequence[int]) -> PeerMemory | None:
        """The GPUs' memory for small sums, where all ranks are on one host and it works."""
        identities = {self._meeting.peers[rank].host_identity for rank in ranks}
        if self._device.type != "cuda" or len(identities) > 1 or len(ranks) > MAX_GPUS:
            return None
        return share_memory(self._meeting, f"tensor-{ranks[0]}", ranks, self._rank, self._device)

    def _host_communicator(self, label: str, ranks: Sequence[int]) -> DeviceCommunicator:
        identities = {self._meeting.peers[rank].host_identity for rank in ranks}
        if supported() and len(identities) == 1 and len(ranks) <= MAX_RANKS:
            return self._shared_memory(label, ranks)
        return self._meeting.run(
            f"connect {label}",
            lambda: GlooCommunicator(
                self._prefix(f"gloo/{label}"),
                ranks.index(self._rank),
                self._names(ranks),
                address=self._address,
                timeout=self._timeout,
                connect_timeout=self._meeting.timeout,
            ),
            ranks,
        )

    def _shared_memory(self, label: str, ranks: Sequence[int]) -> DeviceCommunicator:
        layout = Layout(num_ranks=len(ranks))
        segment = Segment.create(layout.num_bytes, "shoal-group") if self._rank == ranks[0] else None
        addresses = self._meeting.exchange(f"share {label}", segment.address if segment else "", ranks)
        if segment is None:
            try:
                segment = Segment.open(addresses[ranks[0]])
            except OSError as error:
                raise self._meeting.fail(_cannot_share(self._meeting, self._rank, ranks[0], error)) from error
        communicator = SharedMemoryCommunicator(
            segment,
            layout,
            ranks.index(self._rank),
            self._names(ranks),
            [self._meeting.peers[rank].pid for rank in ranks],
            self._timeout,
        )
        self._meeting.exchange(f"map {label}", "", ranks)
        segment.release()
        return communicator

    def _nccl(self, label: str, ranks: Sequence[int]) -> DeviceCommunicator:
        return self._meeting.run(
            f"connect {label} with NCCL",
            lambda: NcclCommunicator(
                self._prefix(f"nccl/{label}"),
                ranks.index(self._rank),
                self._names(ranks),
                device=self._device,
                timeout=self._timeout,
                # Hidden states go up the stages, tokens come down.
                both_ways=list(ranks) == self._dims.pipeline_group(),
            ),
            ranks,
        )

    def _prefix(self, label: str) -> Any:
        return torch.distributed.PrefixStore(label, self._meeting.store)

    def _names(self, ranks: Sequence[int]) -> list[str]:
        return [self._meeting.name(rank) for rank in ranks]


def _first_collectives(meeting: Meeting, groups: ParallelGroups, device: torch.device) -> None:
    """What cannot sum one number will not serve a model: find out now, under the deadline of the start."""
    for group in (groups.world, groups.tensor, groups.pipeline, groups.data):
        if group.world_size == 1:
            continue

        def try_it(group: GroupCoordinator = group) -> int:
            try:
                return int(group.all_reduce(torch.tensor([group.rank], dtype=torch.int64, device=device)).item())
            except CollectiveError as error:
                raise meeting.fail(f"first collective: {error}") from error

        total = meeting.run(f"first collective {group.name}-{group.ranks[0]}", try_it, group.ranks)
        if total != sum(group.ranks):
            raise meeting.fail(
                f"first collective of the {group.name} group of ranks {list(group.ranks)}: "
                f"{meeting.name(group.rank)} got {total} in place of {sum(group.ranks)}"
            )


def _cannot_share(meeting: Meeting, rank: int, owner: int, error: OSError) -> str:
    return (
        f"{meeting.name(rank)} cannot open memory of {meeting.name(owner)} on the same host: {error}; both must run as "
        "one user, and see each other's /proc"
    )
