"""One rank of a test, run as `python -m tests.distributed.ranks SCENARIO RANK SIZE STORE_FILE KIND ...`.

Every scenario compares with plain torch on data that all ranks can compute, and ends with "ok" on stdout.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable

import torch

from shoal.distributed.communicator import tree_sum
from shoal.distributed.gloo import GlooCommunicator
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.meeting import Meeting, file_store, tcp_store
from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.rendezvous import ParallelGroups, form_groups
from shoal.distributed.status import describe_stall
from shoal.errors import CollectiveError, StartupError

DTYPES = (torch.float32, torch.bfloat16, torch.int64)
# 300,001 fp32 are more than a slot of shared memory, and more than one part of a channel.
SHAPES = ((1,), (3, 5), (7, 1, 9), (0, 4), (128, 64), (300_001,))
# A scenario that is not about the end of groups leaves them to the end of the process.
KEPT: list[ParallelGroups] = []
SCENARIOS: dict[str, Callable[..., None]] = {}


def scenario(function: Callable[..., None]) -> Callable[..., None]:
    SCENARIOS[function.__name__] = function
    return function


def data(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(-(2**40), 2**40, shape, generator=generator)


def inputs(seed: int, size: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """What every rank brings."""
    return [data(seed * 100 + rank, shape, dtype) for rank in range(size)]


def group_of(rank: int, size: int, store: str, kind: str, timeout: float = 20.0) -> GroupCoordinator:
    """A tensor-parallel group, over shared memory, or Gloo between ranks that could share it; NCCL: one of stages."""
    if kind == "nccl":
        return form(rank, size, store, kind, timeout, pipeline_size=size).pipeline
    if kind == "shm":
        return form(rank, size, store, kind, timeout).tensor
    meeting = Meeting(file_store(store, size), rank, size, timeout=20.0, generation=0, names={})
    meeting.arrive("127.0.0.1", {})
    names = [meeting.name(each) for each in range(size)]
    communicator = GlooCommunicator(
        torch.distributed.PrefixStore("gloo", meeting.store),
        rank,
        names,
        address="127.0.0.1",
        timeout=timeout,
        connect_timeout=20.0,
    )
    return GroupCoordinator(range(size), rank, communicator, name="tensor")


def form(rank: int, size: int, store: str, kind: str, timeout: float = 20.0, **sizes: int) -> ParallelGroups:
    dims = ParallelDims(rank=rank, **(sizes or {"tensor_size": size}))
    device = torch.device("cuda", rank) if kind == "nccl" else torch.device("cpu")
    if kind == "nccl":
        torch.cuda.set_device(device)
    groups = form_groups(
        dims, device=device, address="127.0.0.1", store_file=store, startup_timeout=60.0, timeout=timeout
    )
    KEPT.append(groups)
    return groups


def same(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, (what, actual.shape, expected.shape)
    assert torch.equal(actual.cpu(), expected), what


def close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, (what, actual.shape, expected.shape)
    torch.testing.assert_close(actual.cpu(), expected, msg=lambda text: f"{what}: {text}")


def check_collectives(group: GroupCoordinator, kind: str) -> None:
    rank, size = group.rank_in_group, group.world_size
    assert group.communicator is not None
    device = group.communicator.device
    sums = same if kind == "shm" else close
    seed = 0
    for dtype in DTYPES:
        for shape in SHAPES:
            seed += 1
            what = f"{dtype} {shape}"
            everyone = inputs(seed, size, shape, dtype)
            # Not a view of everyone's: what works in place must not change what is expected.
            mine = everyone[rank].clone().to(device)
            total = tree_sum(everyone)
            close(tree_sum(everyone), torch.stack(everyone).to(torch.float64).sum(0).to(dtype), what) if (
                dtype.is_floating_point
            ) else same(total, torch.stack(everyone).sum(0), what)
            sums(group.all_reduce(mine.clone()), total, f"all_reduce {what}")
            if dtype is torch.float32 and 8 % size == 0:
                shards = data(seed, (8, *shape), dtype)
                part = shards[rank * 8 // size : (rank + 1) * 8 // size].to(device)
                same(group.all_reduce_tree(part), tree_sum(list(shards)), f"all_reduce_tree {what}")
            for dim in range(-1, len(shape)):
                same(group.all_gather(mine, dim), torch.cat(everyone, dim), f"all_gather {dim} {what}")
                gathered = group.gather(mine, size - 1, dim)
                assert (gathered is None) == (rank != size - 1)
                if gathered is not None:
                    same(gathered, torch.cat(everyone, dim), f"gather {dim} {what}")
                whole = [torch.cat([each] * size, dim) * (index + 1) for index, each in enumerate(everyone)]
                expected = tree_sum(whole).chunk(size, dim)[rank] if whole[0].numel() else everyone[0]
                sums(group.reduce_scatter(whole[rank].to(device), dim), expected, f"reduce_scatter {dim} {what}")
            for source in range(size):
                same(group.broadcast(mine.clone(), source), everyone[source], f"broadcast {source} {what}")
            transfer = group.isend(mine)
            same(group.recv(shape, dtype), everyone[(rank - 1) % size], f"recv {what}")
            transfer.wait()
            group.barrier()
    # What is not contiguous comes out the same.
    everyone = inputs(99, size, (6, 4), torch.float32)
    close(group.all_reduce(everyone[rank].to(device).t()), tree_sum(everyone).t(), "transposed")
    check_started_sums(group, kind)


def check_started_sums(group: GroupCoordinator, kind: str) -> None:
    """Two at a time, with work of this rank's own between them."""
    rank, size = group.rank_in_group, group.world_size
    assert group.overlaps(torch.zeros(1)) == (kind == "nccl")
    device = torch.device("cuda", rank) if kind == "nccl" else torch.device("cpu")
    for seed in range(4):
        both = [inputs(seed + half, size, (300, 64 + half), torch.float32) for half in range(2)]
        started = [group.start_all_reduce(everyone[rank].to(device, copy=True)) for everyone in both]
        own = both[0][rank].to(device)
        product = own @ own.t()
        for pending, everyone in zip(started, both, strict=True):
            close(pending.wait() * 2, tree_sum(everyone) * 2, "a sum that was started")
        close(product, both[0][rank] @ both[0][rank].t(), "what was computed meanwhile")


def check_tensor_dicts(group: GroupCoordinator, kind: str) -> None:
    assert group.communicator is not None
    device = group.communicator.device
    for names in (3, 200):  # the second describes more than the first message holds
        entries: dict[str, object] = {
            f"tensor {index}": data(index, (index % 5, 7), DTYPES[index % 3]).to(device if index % 2 else "cpu")
            for index in range(names)
        }
        entries |= {"step": 7, "name": "prefill", "flags": [True, None, 1.5], "map": {"a": b"\0"}}
        transfer = group.isend_tensor_dict(entries)
        for received in (
            group.recv_tensor_dict(),
            group.broadcast_tensor_dict(entries if group.rank_in_group == 1 else None, 1),
        ):
            assert list(received) == list(entries)
            for name, value in entries.items():
                if isinstance(value, torch.Tensor):
                    assert received[name].device == value.device
                    same(received[name], value.cpu(), name)
                else:
                    assert received[name] == value
        transfer.wait()


def check_large_transfers(group: GroupCoordinator, kind: str) -> None:
    """More than a channel holds, several at once, in both directions."""
    rank, size = group.rank_in_group, group.world_size
    assert group.communicator is not None
    device = group.communicator.device
    sent = [data(index * size + rank, (5_000_000 + index,), torch.float32).to(device) for index in range(3)]
    transfers = [group.isend(x) for x in sent]
    for index in range(3):
        expected = data(index * size + (rank - 1) % size, (5_000_000 + index,), torch.float32)
        same(group.recv(expected.shape, torch.float32), expected, f"transfer {index}")
    for transfer in transfers:
        transfer.wait()


def check_same_bits(group: GroupCoordinator, kind: str) -> None:
    """All ranks get the same bits, whatever the size, and again in a second run."""
    rank, size = group.rank_in_group, group.world_size
    for num_elements in (10, 1000, 40_000, 700_000):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            total = group.all_reduce(data(rank, (num_elements,), dtype))
            same(total, group.all_reduce(data(rank, (num_elements,), dtype)), "again")
            for other in group.all_gather(total, 0).chunk(size):
                same(other, total, f"{num_elements} {dtype}")


@scenario
def all_checks(rank: int, size: int, store: str, kind: str) -> None:
    """One group goes through everything, so that no operation leaves behind what harms the next."""
    group = group_of(rank, size, store, kind)
    check_collectives(group, kind)
    check_tensor_dicts(group, kind)
    check_large_transfers(group, kind)
    if kind == "shm":
        check_same_bits(group, kind)
    check_tensor_dicts(group, kind)


@scenario
def grid(rank: int, size: int, store: str, kind: str) -> None:
    """The groups of a grid are the ones that the rank arithmetic names."""
    groups = form(rank, size, store, kind, tensor_size=size // 2, pipeline_size=2)
    device = "cuda" if kind == "nccl" else "cpu"
    for group, ranks in (
        (groups.world, range(size)),
        (groups.tensor, groups.dims.tensor_group()),
        (groups.pipeline, groups.dims.pipeline_group()),
        (groups.data, [rank]),
    ):
        assert group.ranks == tuple(ranks) and group.ranks[group.rank_in_group] == rank
        total = group.all_reduce(torch.tensor([1 << rank], device=device))
        assert total.item() == sum(1 << each for each in ranks)
    records = groups.host_status()
    assert [record.rank for record in records] == list(range(size)) and records[rank].pid == os.getpid()
    # The rank itself is in none; another may be in a collective still.
    assert not any(status.inside for status in records[rank].groups.values())
    groups.world.barrier()
    groups.close()
    groups.close()


@scenario
def killed(rank: int, size: int, store: str, kind: str) -> None:
    """Rank 1 dies in the middle of a run of collectives; the others raise well before the timeout, and say so."""
    group = group_of(rank, size, store, kind, timeout=60.0)
    started = time.monotonic()
    try:
        for step in range(1_000_000):
            if rank == 1 and step == 200:
                os.kill(os.getpid(), signal.SIGKILL)
            group.all_reduce(torch.ones(5000))
    except CollectiveError as error:
        assert time.monotonic() - started < 30
        print(error)


@scenario
def stopped(rank: int, size: int, store: str, kind: str) -> None:
    """Rank 1 stops coming; the others raise at the timeout and say where everyone is."""
    groups = form(rank, size, store, kind, timeout=1.5)
    groups.status.update(generation=3, step=12, phase="forward")
    groups.status.enter_layer(7)
    for _ in range(5):
        groups.tensor.all_reduce(torch.ones(3))
    if rank == 1:
        time.sleep(4)
        return
    try:
        groups.tensor.all_reduce(torch.ones(3))
    except CollectiveError as error:
        print(error)
        print(describe_stall(groups.host_status()))


@scenario
def late(rank: int, size: int, store: str, kind: str) -> None:
    """The last rank never comes: its name is in the error of all the others."""
    if rank == size - 1:
        return
    # The others are there at once: how long a process takes to start is no part of this.
    present = Meeting(file_store(store, size), rank, size - 1, timeout=60.0, generation=9, names={})
    present.arrive("127.0.0.1", {})
    try:
        form_groups(
            ParallelDims(rank=rank, tensor_size=size),
            device=torch.device("cpu"),
            address="127.0.0.1",
            store_file=store,
            startup_timeout=1.0,
            names={size - 1: f"rank {size - 1} (on node-b, 10.0.0.4)"},
        )
    except StartupError as error:
        print(error)


@scenario
def other_version(rank: int, size: int, store: str, kind: str) -> None:
    try:
        form_groups(
            ParallelDims(rank=rank, tensor_size=size),
            device=torch.device("cpu"),
            address="127.0.0.1",
            store_file=store,
            startup_timeout=20.0,
            facts={"torch": "2.13.0" if rank else "2.11.0", "shoal": "1"},
        )
    except StartupError as error:
        print(error)


@scenario
def master(rank: int, size: int, store: str, kind: str, port: str) -> None:
    """Meet over TCP."""
    groups = form_groups(
        ParallelDims(rank=rank, tensor_size=size),
        device=torch.device("cpu"),
        address="127.0.0.1",
        master_address="127.0.0.1",
        master_port=int(port),
        startup_timeout=20.0,
    )
    assert groups.world.all_reduce(torch.ones(1)).item() == size
    groups.close()


@scenario
def lonely(rank: int, size: int, store: str, kind: str, port: str) -> None:
    """Rank 1 of two looks for a rank 0 that is not there."""
    try:
        tcp_store("127.0.0.1", int(port), 1, 1.0)
    except StartupError as error:
        print(error)


@scenario
def graph(rank: int, size: int, store: str, kind: str) -> None:
    """A collective in a CUDA graph sums what the buffer holds at each replay."""
    group = group_of(rank, size, store, kind)
    buffer = torch.ones(4096, device="cuda")
    group.all_reduce(buffer.clone())
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        total = group.all_reduce(buffer * 2)
    for value in (1.0, 3.0):
        buffer.fill_(value + rank)
        captured.replay()
        same(total, torch.full((4096,), 2 * sum(value + each for each in range(size))), "replay")


def main() -> None:
    name, rank, size, store, kind, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    # Sooner than the parent gives up: a rank that hangs says where.
    faulthandler.dump_traceback_later(80, exit=True)
    SCENARIOS[name](int(rank), int(size), store, kind, *rest)
    print("ok", flush=True)
    # Gloo's own threads must not turn a finished test into a crash at exit.
    os._exit(0)


if __name__ == "__main__":
    main()
