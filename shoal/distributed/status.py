"""What each rank is doing, in shared memory: written by its worker at every collective, read by others when it stalls.

One board a host. A record is written without locks: whoever reads looks at ranks that stand still.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Sequence

import msgspec

from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.segment import Segment

PHASES = ("new", "rendezvous", "load", "size", "capture", "idle", "forward", "sample", "end")
GROUPS = ("world", "tensor", "pipeline", "data")
OPERATIONS = (
    "none",
    "all_reduce",
    "all_reduce_tree",
    "all_gather",
    "reduce_scatter",
    "broadcast",
    "gather",
    "barrier",
    "send",
    "recv",
)

_HEAD = struct.Struct("<IIIIII")  # rank + 1 (0: nobody yet), pid, data, pipeline and tensor size, zero
_STEP = struct.Struct("<QQIid")  # generation, step, phase, layer, since
_LAYER = struct.Struct("<i")  # within it
_GROUP = struct.Struct("<QIIid")  # collectives entered, operation, inside, peer, since
_BUSY = struct.Struct("<d")  # seconds
_USE = struct.Struct("<dQQ")  # seconds in collectives, bytes of the process in memory, bytes of the device
_STEP_AT = _HEAD.size
_LAYER_AT = _STEP_AT + struct.calcsize("<QQI")
_GROUPS_AT = _STEP_AT + _STEP.size
_BUSY_AT = _GROUPS_AT + _GROUP.size * len(GROUPS)
_USE_AT = _BUSY_AT + _BUSY.size
_EXPERTS = struct.Struct("<II")  # the first expert of which something is known here, of how many
_EXPERTS_AT = _USE_AT + _USE.size
_TOKENS_AT = _EXPERTS_AT + _EXPERTS.size  # a Q for each
# More than any model has; of others nothing is told.
MOST_EXPERTS = 1024
RECORD_BYTES = _TOKENS_AT + 8 * MOST_EXPERTS


class GroupStatus(msgspec.Struct, frozen=True):
    """One group's last operation. `number` counts its collectives, the same on all its ranks; send and recv do not
    count. `peer` is the global rank at the other end of a send or recv, -1 for a collective."""

    number: int
    operation: str
    inside: bool
    peer: int
    since: float


class RankStatus(msgspec.Struct, frozen=True):
    """What one rank was doing when it was read. Times are seconds of this host's monotonic clock.

    busy_seconds: how long it has computed steps since its start, without waiting for other stages. collective_seconds:
    how long its host was inside of collectives (on a GPU they are queued there, which takes no time). host_bytes,
    device_bytes: memory that the process holds. expert_tokens: routed to each expert from first_expert on, in all
    layers of the rank's stage; empty where another rank tells it, or there are none.
    """

    rank: int
    pid: int
    data_size: int
    pipeline_size: int
    tensor_size: int
    generation: int
    step: int
    phase: str
    layer: int
    since: float
    groups: dict[str, GroupStatus]
    busy_seconds: float
    read_at: float
    collective_seconds: float = 0.0
    host_bytes: int = 0
    device_bytes: int = 0
    first_expert: int = 0
    expert_tokens: tuple[int, ...] = ()

    @property
    def seconds_since_progress(self) -> float:
        """Since it went from one step, phase or collective to the next."""
        return self.read_at - max([self.since, *(group.since for group in self.groups.values())])

    @property
    def num_collectives(self) -> int:
        """That it has entered, in all groups."""
        return sum(group.number for group in self.groups.values())


class StatusRecord:
    """This rank's record, where it writes. Alone (no board) it is private memory, and costs the same."""

    def __init__(self, dims: ParallelDims, memory: mmap.mmap | None = None, index: int = 0) -> None:
        self._memory = memory if memory is not None else mmap.mmap(-1, RECORD_BYTES)
        self._start = index * RECORD_BYTES
        self._numbers = [0] * len(GROUPS)
        self._step = (0, 0, 0)
        self._layer = -1
        self._busy_seconds = 0.0
        self._entered = 0.0
        self._collective_seconds = 0.0
        self._memory_bytes = (0, 0)
        _HEAD.pack_into(
            self._memory,
            self._start,
            dims.rank + 1,
            os.getpid(),
            dims.data_size,
            dims.pipeline_size,
            dims.tensor_size,
            0,
        )
        self.update(phase="new")

    def update(
        self,
        *,
        generation: int | None = None,
        step: int | None = None,
        phase: str | None = None,
    ) -> None:
        """Say where this rank is: what is not given stays."""
        old = self._step
        self._step = (
            old[0] if generation is None else generation,
            old[1] if step is None else step,
            old[2] if phase is None else PHASES.index(phase),
        )
        _STEP.pack_into(self._memory, self._start + _STEP_AT, *self._step, self._layer, time.monotonic())

    def enter_layer(self, layer: int) -> None:
        """Said before each layer of each step, so nothing else is written. -1: between the last and the first."""
        self._layer = layer
        _LAYER.pack_into(self._memory, self._start + _LAYER_AT, layer)

    def add_busy(self, seconds: float) -> None:
        """This rank has computed for so long, waits for other stages not counted: what is left is the bubble."""
        self._busy_seconds += seconds
        _BUSY.pack_into(self._memory, self._start + _BUSY_AT, self._busy_seconds)

    def enter(self, group: int, operation: int, peer: int = -1) -> None:
        """This rank enters `operation` (an index of OPERATIONS) of `group` (of GROUPS). A peer means send or recv."""
        if peer < 0:
            self._numbers[group] += 1
        self._entered = time.monotonic()
        _GROUP.pack_into(
            self._memory,
            self._start + _GROUPS_AT + group * _GROUP.size,
            self._numbers[group],
            operation,
            1,
            peer,
            self._entered,
        )

    def raw(self) -> bytes:
        """The record as it is now: for another host, which reads it with `read_record`."""
        return self._memory[self._start : self._start + RECORD_BYTES]

    def leave(self, group: int) -> None:
        """The operation that this rank entered last in `group` is done."""
        self._memory[self._start + _GROUPS_AT + group * _GROUP.size + 12] = 0
        self._collective_seconds += time.monotonic() - self._entered
        _USE.pack_into(self._memory, self._start + _USE_AT, self._collective_seconds, *self._memory_bytes)

    def set_memory(self, host_bytes: int, device_bytes: int) -> None:
        """What this process holds."""
        self._memory_bytes = host_bytes, device_bytes
        _USE.pack_into(self._memory, self._start + _USE_AT, self._collective_seconds, *self._memory_bytes)

    def set_experts(self, first: int, tokens: Sequence[int]) -> None:
        """Tokens that were routed to the experts from `first` on."""
        if len(tokens) <= MOST_EXPERTS:
            _EXPERTS.pack_into(self._memory, self._start + _EXPERTS_AT, first, len(tokens))
            struct.pack_into(f"<{len(tokens)}Q", self._memory, self._start + _TOKENS_AT, *tokens)


class StatusBoard:
    """The records of a host's ranks. Whoever creates it hands `address` to the others, which must run on this host."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment

    @classmethod
    def create(cls, num_records: int) -> StatusBoard:
        return cls(Segment.create(num_records * RECORD_BYTES, "shoal-status"))

    @classmethod
    def open(cls, address: str) -> StatusBoard:
        """The board at `address`, as long as its creator or another that opened it lives. OSError if it is gone."""
        return cls(Segment.open(address))

    @property
    def address(self) -> str:
        return self._segment.address

    @property
    def num_records(self) -> int:
        return len(self._segment.memory) // RECORD_BYTES

    def record(self, dims: ParallelDims, index: int) -> StatusRecord:
        """The record of this host's rank number `index`, to write to."""
        if not 0 <= index < self.num_records:
            raise ValueError(f"a board of {self.num_records} records has no record {index}")
        return StatusRecord(dims, self._segment.memory, index)

    def read(self) -> list[RankStatus]:
        """What every rank that has a record here is doing now, by rank."""
        records = [_read(self._segment.memory, index * RECORD_BYTES) for index in range(self.num_records)]
        return sorted((record for record in records if record is not None), key=lambda record: record.rank)


def read_record(raw: bytes, read_at: float) -> RankStatus | None:
    """What `StatusRecord.raw` said, with `read_at` on the clock of the host that it comes from; None if nothing yet."""
    record = _read(raw, 0) if len(raw) == RECORD_BYTES else None
    return None if record is None else msgspec.structs.replace(record, read_at=read_at)


def _read(memory: mmap.mmap | bytes, start: int) -> RankStatus | None:
    rank, pid, data_size, pipeline_size, tensor_size, _ = _HEAD.unpack_from(memory, start)
    if not rank:
        return None
    generation, step, phase, layer, since = _STEP.unpack_from(memory, start + _STEP_AT)
    groups = {}
    for index, name in enumerate(GROUPS):
        number, operation, inside, peer, entered = _GROUP.unpack_from(memory, start + _GROUPS_AT + index * _GROUP.size)
        if operation:
            groups[name] = GroupStatus(number, OPERATIONS[operation], bool(inside), peer, entered)
    collective_seconds, host_bytes, device_bytes = _USE.unpack_from(memory, start + _USE_AT)
    first_expert, num_experts = _EXPERTS.unpack_from(memory, start + _EXPERTS_AT)
    return RankStatus(
        rank=rank - 1,
        pid=pid,
        data_size=data_size,
        pipeline_size=pipeline_size,
        tensor_size=tensor_size,
        generation=generation,
        step=step,
        phase=PHASES[phase],
        layer=layer,
        since=since,
        groups=groups,
        busy_seconds=_BUSY.unpack_from(memory, start + _BUSY_AT)[0],
        read_at=time.monotonic(),
        collective_seconds=collective_seconds,
        host_bytes=host_bytes,
        device_bytes=device_bytes,
        first_expert=first_expert,
        expert_tokens=struct.unpack_from(f"<{num_experts}Q", memory, start + _TOKENS_AT),
    )


def describe_stall(records: Sequence[RankStatus]) -> str:
    """One line: which rank waits in which collective, and which of its group never entered it, and where those are."""
    if not records:
        return "no rank has left a status record"
    by_rank = {record.rank: record for record in records}
    waits: dict[tuple[str, tuple[int, ...], int, str], list[RankStatus]] = {}
    sentences = []
    for record in sorted(records, key=lambda each: each.rank):
        for group, status in record.groups.items():
            if status.inside and status.peer >= 0:
                preposition = "to" if status.operation == "send" else "from"
                sentences.append(
                    f"rank {record.rank} waits{_seconds(record, status.since)} in {status.operation} {preposition} "
                    f"rank {status.peer}"
                )
                if status.peer in by_rank and not _inside(by_rank[status.peer]):
                    sentences.append(_whereabouts(by_rank[status.peer]))
            elif status.inside:
                key = (group, _members(record, group), status.number, status.operation)
                waits.setdefault(key, []).append(record)
    for (group, members, number, operation), waiting in waits.items():
        sentences += _describe_wait(group, members, number, operation, waiting, by_rank)
    if not sentences:
        sentences = ["no rank waits in a collective", *_behind(by_rank), *(_whereabouts(record) for record in records)]
    return "; ".join(dict.fromkeys(sentences))


def _describe_wait(
    group: str,
    members: tuple[int, ...],
    number: int,
    operation: str,
    waiting: list[RankStatus],
    by_rank: dict[int, RankStatus],
) -> list[str]:
    names = _names([record.rank for record in waiting])
    longest = max(waiting, key=lambda record: record.read_at - record.groups[group].since)
    verb = "waits" if len(waiting) == 1 else "wait"
    sentences = [f"{names} {verb}{_seconds(longest, longest.groups[group].since)} in {operation} {number} ({group})"]
    absent = [rank for rank in members if rank not in by_rank]
    missing = [rank for rank in members if rank in by_rank and _number(by_rank[rank], group) < number]
    past = [
        rank
        for rank in members
        if rank in by_rank and rank not in [record.rank for record in waiting] and rank not in missing
    ]
    if missing:
        sentences.append(f"{_names(missing)} never entered it")
        sentences += [_whereabouts(by_rank[rank]) for rank in missing if not _inside(by_rank[rank])]
    if past:
        sentences.append(f"{_names(past)} left it already")
    if absent:
        sentences.append(f"what {_names(absent)} {'does' if len(absent) == 1 else 'do'} is not known here")
    return sentences


def _behind(by_rank: dict[int, RankStatus]) -> list[str]:
    """On a GPU, collectives are queued and nobody is inside: whoever has queued fewer than its group is suspect."""
    sentences = []
    for group in GROUPS:
        for members in dict.fromkeys(_members(record, group) for record in by_rank.values()):
            numbers = {rank: _number(by_rank[rank], group) for rank in members if rank in by_rank}
            furthest = max(numbers.values())
            sentences += [
                f"rank {rank} has begun {number} collectives ({group}), others {furthest}"
                for rank, number in numbers.items()
                if number < furthest
            ]
    return sentences


def _members(record: RankStatus, group: str) -> tuple[int, ...]:
    dims = ParallelDims(
        data_size=record.data_size,
        pipeline_size=record.pipeline_size,
        tensor_size=record.tensor_size,
        rank=record.rank,
    )
    return tuple(dims.group(group))


def _number(record: RankStatus, group: str) -> int:
    return record.groups[group].number if group in record.groups else 0


def _inside(record: RankStatus) -> bool:
    return any(status.inside for status in record.groups.values())


def _seconds(record: RankStatus, since: float) -> str:
    elapsed = record.read_at - since
    return f" for {elapsed:.1f} s" if elapsed >= 0.1 else ""


def _whereabouts(record: RankStatus) -> str:
    layer = f", layer {record.layer}" if record.layer >= 0 else ""
    return f"rank {record.rank} (pid {record.pid}) is in step {record.step}, phase {record.phase}{layer}"


def _names(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
