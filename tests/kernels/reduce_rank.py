"""One rank of a test of small sums, run as `python -m tests.kernels.reduce_rank SCENARIO RANK SIZE STORE_FILE`."""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from shoal.distributed.communicator import LargeReducer
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.meeting import Meeting, file_store
from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.rendezvous import form_groups
from shoal.distributed.symmetric_memory import NUM_SLOTS, CudaDriver, PeerMemory, share_memory
from shoal.kernels.all_reduce import PeerKernels
from shoal.kernels.copied_sum import CopyLane, CopyReducer, memory_bytes
from shoal.kernels.large_reducer import attach_large_reducer
from shoal.kernels.small_reducer import attach_small_reducer

MIN_BYTES = 16 << 20  # of large sums
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-23}


def parts_of(size: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """What every rank brings: all know it."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(size)]


def check_sum(result: torch.Tensor, parts: list[torch.Tensor], what: str) -> None:
    expected = sum(part.double() for part in parts)
    scale = sum(part.double().abs() for part in parts)
    error = (result.double() - expected).abs()
    assert bool((error <= expected.abs() * ULP[result.dtype] / 2 * 1.001 + scale * 2**-22).all()), what


def check_same_bits(group: GroupCoordinator, result: torch.Tensor, what: str) -> None:
    for other in group.all_gather(result.reshape(1, -1), 0):
        assert torch.equal(other.view(torch.uint8), result.reshape(-1).view(torch.uint8)), f"{what}: bits differ"


def one_gpu(rank: int, size: int, store: str) -> None:
    """Processes that share GPU 0 take turns on it: slow, but the memory of each is mapped in the others."""
    device = torch.device("cuda", 0)
    meeting = Meeting(file_store(store, size), rank, size, timeout=60.0, generation=0, names={})
    memory = share_memory(meeting, "test", range(size), rank, device)
    assert memory is not None
    kernels = PeerKernels(memory, 30.0)
    kernels.all_reduce(torch.empty(0, dtype=torch.bfloat16, device=device), False)
    kernels.all_reduce(torch.empty(0, dtype=torch.bfloat16, device=device), True)
    torch.cuda.synchronize()
    meeting.exchange("compiled", "")
    for seed in range(6):
        parts = parts_of(size, (64, 96), torch.bfloat16, seed)
        x = kernels.all_reduce(parts[rank].clone(), seed % 2 == 0)
        check_sum(x, parts, f"sum {seed}")
        digest = str(x.view(torch.int16).long().mul(torch.arange(x.numel(), device=device).view_as(x)).sum().item())
        assert len(set(meeting.exchange(f"sum {seed}", digest).values())) == 1
    check_copies(meeting, rank, size, device)
    meeting.exchange("end", "")


def check_copies(meeting: Meeting, rank: int, size: int, device: torch.device) -> None:
    """Large sums: the engines copy within the one GPU here, but streams, flags and mappings are as between several."""
    max_bytes = 1 << 20
    memory = share_memory(meeting, "large", range(size), rank, device, num_bytes=memory_bytes(size, max_bytes), word=0)
    assert memory is not None
    driver = CudaDriver()
    reducer = CopyReducer(memory, 0, max_bytes, [CopyLane(device, driver) for _ in range(NUM_SLOTS)])
    reducer.try_alone(512, torch.bfloat16)
    torch.cuda.synchronize()
    meeting.exchange("tried", "")
    check_large(reducer, rank, size, [(64, 48 * size), (1, 8 * size), (500, 40 * size)])


def check_large(reducer: LargeReducer, rank: int, size: int, shapes: list[tuple[int, int]]) -> None:
    """Two at a time, as layers in halves have them, and what is computed meanwhile comes before them or after."""
    for dtype in DTYPES:
        for index, shape in enumerate(shapes * 2):
            both = [parts_of(size, shape, dtype, 2 * index + half) for half in range(2)]
            mine = [parts[rank].clone() for parts in both]
            pending = [reducer.start(each.mul_(2)) for each in mine]
            for parts, each, summand in zip(both, pending, mine, strict=True):
                result = each.wait()
                summand.zero_()  # it is no longer needed
                check_sum(result, [part * 2 for part in parts], f"large {dtype} {shape}")


def check_attached(group: GroupCoordinator, share: Callable[[int], PeerMemory | None]) -> None:
    size, rank = group.world_size, group.rank_in_group
    print(attach_large_reducer(group, (MIN_BYTES // 8192, 5 * MIN_BYTES // 8192), 4096, torch.bfloat16, share))
    assert group.large_reducer is not None
    rows = MIN_BYTES // 2 // 4096 + 5
    check_large(group.large_reducer, rank, size, [(rows, 4096), (rows // 2, 16384)])
    parts = parts_of(size, (rows, 4096), torch.bfloat16, 7)
    assert group.overlaps(parts[rank])
    result = group.start_all_reduce(parts[rank]).wait()
    check_same_bits(group, result, "large")
    # Ranks that are late at another time each, and no time for the host to look. Small integers: exact.
    totals = []
    for turn in range(40):
        if turn % 7 == rank:
            torch.cuda._sleep(2_000_000)
        numbers = [
            torch.full((rows, 4096), sign * turn + rank, dtype=torch.bfloat16, device="cuda") for sign in (1, -1)
        ]
        totals += [torch.stack(each.wait().aminmax()) for each in [group.start_all_reduce(x) for x in numbers]]
    expected = [[size * sign * turn + sum(range(size))] * 2 for turn in range(40) for sign in (1, -1)]
    assert torch.stack(totals).tolist() == expected


def check_stream(group: GroupCoordinator) -> None:
    """Layers in a row, in two halves, each rank with the stream of its own rows, against the whole in fp32."""
    size, rank, shape = group.world_size, group.rank_in_group, (2049, 4096)
    weight = parts_of(1, (4096,), torch.bfloat16, 1)[0]
    streams = parts_of(2, shape, torch.bfloat16, 2)
    totals = [stream.float() for stream in streams]
    owns = []
    for stream in streams:
        rows = group.rows_of_stream(stream)
        assert rows is not None
        owns.append(stream[rows].clone())
    for layer in range(6):
        both = [parts_of(size, shape, torch.bfloat16, 10 + 2 * layer + half) for half in range(2)]
        norm = None if layer == 5 else weight
        pending = [
            group.start_all_reduce_add_norm(parts[rank], own, norm, 1e-5) for parts, own in zip(both, owns, strict=True)
        ]
        for half, parts in enumerate(both):
            totals[half] = (totals[half] + sum(part.float() for part in parts)).bfloat16().float()
            expected = totals[half] if norm is None else F.rms_norm(totals[half], (4096,), weight.float(), 1e-5)
            result = pending[half].wait()
            # The order of additions may round a total of the stream the other way, now and then.
            error = (result.float() - expected).abs() > expected.abs() * 2**-7 + 2**-7
            assert error.float().mean() < 1e-3, (layer, half)
            check_same_bits(group, result, f"layer {layer}")


def lost(rank: int, size: int, store: str) -> None:
    """A rank that never comes: the others' streams wait, and their processes end all the same."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dims = ParallelDims(tensor_size=size, rank=rank)
    groups = form_groups(dims, device=device, address="127.0.0.1", store_file=store, startup_timeout=60.0)
    print(
        attach_large_reducer(
            groups.tensor, (MIN_BYTES // 8192, MIN_BYTES // 4096), 4096, torch.bfloat16, groups.share_memory
        )
    )
    assert groups.tensor.large_reducer is not None
    if rank:
        done = groups.tensor.start_all_reduce(torch.ones(MIN_BYTES, dtype=torch.bfloat16, device=device)).wait()
        event = torch.cuda.Event()
        event.record()
        time.sleep(1.0)
        assert not event.query() and done.shape, "nothing has come"
    print("ok", flush=True)
    os._exit(0)


def many_gpus(rank: int, size: int, store: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dims = ParallelDims(tensor_size=size, rank=rank)
    groups = form_groups(dims, device=device, address="127.0.0.1", store_file=store, startup_timeout=60.0)
    group = groups.tensor
    assert group.memory is not None, "the GPUs of this host cannot share memory"
    print(attach_small_reducer(group))
    assert group.reducer is not None
    check_sizes(group)
    check_rows(group)
    check_replays(group)
    groups.close()


def large(rank: int, size: int, store: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dims = ParallelDims(tensor_size=size, rank=rank)
    groups = form_groups(dims, device=device, address="127.0.0.1", store_file=store, startup_timeout=60.0)
    check_attached(groups.tensor, groups.share_memory)
    check_stream(groups.tensor)
    groups.close()


def check_sizes(group: GroupCoordinator) -> None:
    """Sizes on both sides of every threshold; those that nobody takes go by NCCL, which rounds as it likes."""
    assert group.reducer is not None
    num_taken = 0
    for dtype in DTYPES:
        for index, num_elements in enumerate((8, 64, 4096, 8 * 1009, 100_000, 500_000, 1 << 20, 3 << 20, 6_000_001)):
            parts = parts_of(group.world_size, (num_elements,), dtype, index)
            x = parts[group.rank_in_group].clone()
            takes = group.reducer.takes(x)
            num_taken += takes
            what = f"{dtype} {num_elements}"
            result = group.all_reduce(x)
            assert result.data_ptr() == x.data_ptr(), "the sum is in x"
            check_same_bits(group, result, what)
            if takes:
                check_sum(result, parts, what)
    assert num_taken > 10
    integers = group.all_reduce(torch.tensor([2**40 + group.rank], device="cuda"))
    assert integers.item() == sum(2**40 + rank for rank in group.ranks)


def check_rows(group: GroupCoordinator) -> None:
    assert group.reducer is not None
    # Each width, type and way is a kernel to compile.
    shapes = {
        torch.bfloat16: ((1, 4096), (33, 5120), (64, 4096), (200, 2048), (4000, 4096)),
        torch.float16: ((7, 896),),
        torch.float32: ((7, 896),),
    }
    for dtype in DTYPES:
        for index, shape in enumerate(shapes[dtype]):
            parts = parts_of(group.world_size, shape, dtype, index)
            residual = parts_of(1, shape, dtype, 1000 + index)[0]
            weight = parts_of(1, (shape[1],), dtype, 2000 + index)[0]
            for each in (residual, None) if shape[1] == 4096 else (residual,):
                summand = parts[group.rank_in_group].clone()
                takes = group.reducer.takes_rows(summand)
                normed, total = group.all_reduce_add_norm(summand, each, weight, 1e-5)
                what = f"rows {dtype} {shape} {takes}"
                check_same_bits(group, total, what)
                check_same_bits(group, normed, what)
                if takes:
                    check_sum(total, parts if each is None else [*parts, each], what)
                expected = F.rms_norm(total.float(), (shape[1],), weight.float(), 1e-5)
                assert bool(((normed.float() - expected).abs() <= expected.abs() * ULP[dtype] * 1.01 + 1e-5).all()), (
                    what
                )


def check_replays(group: GroupCoordinator) -> None:
    """A graph of a small model's sums, replayed with other inputs, with eager calls of other sizes in between."""
    size, rank = group.world_size, group.rank_in_group
    weight = torch.ones(2048, dtype=torch.bfloat16, device="cuda")
    buffer = torch.zeros(16, 2048, dtype=torch.bfloat16, device="cuda")

    def compute() -> list[torch.Tensor]:
        first = group.all_reduce(buffer.clone())
        wide = group.all_reduce(buffer.repeat(20, 1))
        total = group.all_reduce_add_norm(buffer * 2, first, weight, 1e-5)[1]
        return [first, wide[-16:], total]

    assert group.reducer is not None
    # NCCL rounds on the way, so its sum is not looked at here.
    indices = [0, 1, 2] if group.reducer.takes(buffer.repeat(20, 1)) else [0, 2]
    compute()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = compute()
    for turn in range(50):
        parts = parts_of(size, (16, 2048), torch.bfloat16, turn)
        buffer.copy_(parts[rank])
        graph.replay()
        if turn % 3 == 0:
            more = parts_of(size, (480 * (turn + 1),), torch.float32, turn)
            check_sum(group.all_reduce(more[rank].clone()), more, f"between {turn}")
        expected = [parts, parts, [*(part * 2 for part in parts), results[0]]]
        for index in indices:
            check_sum(results[index], expected[index], f"replay {turn}, result {index}")
    # Many in a row, each rank late at another time.
    for turn in range(300):
        if turn % 29 == 7 * rank:
            torch.cuda._sleep(500_000)
        graph.replay()
    for index in indices:
        check_sum(results[index], expected[index], "after many replays")
    # NCCL's group may not end before the graphs that hold its operations.
    graph.reset()


def main() -> None:
    scenario, rank, size, store = sys.argv[1:]
    faulthandler.dump_traceback_later(80, exit=True)
    {"one_gpu": one_gpu, "many_gpus": many_gpus, "large": large, "lost": lost}[scenario](int(rank), int(size), store)
    torch.cuda.synchronize()
    print("ok", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
