"""What a collective costs: microseconds by transport and size. `python benchmarks/collectives.py --help`.

Ranks are processes of this host: shared memory against Gloo on the CPU, and NCCL where there are enough GPUs. The
figure is the median over repeats of what rank 0 waits for, with one computing thread a rank. On a GPU it is the mean of
calls in a row without CUDA graphs, so small sizes cost what their launch costs.

µs, 2 ranks, bf16, 2026-11: 2 cores (AMD EPYC, AVX-512), torch 2.13 | a host of 32 cores with 2 H200s, torch 2.11
                      shared memory   Gloo | shared memory    Gloo   NCCL
    all_reduce 16 KB              8    368 |            21     178     33
    all_reduce 64 KB             19    304 |            37     243     35
    all_reduce 256 KB            61    514 |           110     546     28
    all_reduce 1 MB             170   2051 |           400    2154     29
    all_reduce 8 MB            1855  13310 |          3078   17832     46
    barrier                       2    195 |             2      61      –
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from shoal.distributed.gloo import GlooCommunicator
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.meeting import Meeting, file_store
from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.rendezvous import form_groups

SIZES = {"16 KB": 16 << 10, "64 KB": 64 << 10, "256 KB": 256 << 10, "1 MB": 1 << 20, "8 MB": 8 << 20}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--num-repeats", type=int, default=200)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--transport", help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(arguments)
        return
    transports = ["shared memory", "Gloo"]
    if torch.cuda.device_count() >= arguments.num_ranks:
        transports.append("NCCL")
    results = {transport: measure(transport, arguments) for transport in transports}
    print(f"µs, {arguments.num_ranks} ranks, {arguments.dtype}, {os.cpu_count()} cores, torch {torch.__version__}")
    print("".join(f"{title:>16}" for title in ["", *transports]))
    for name in results["Gloo"]:
        print(f"{name:>16}" + "".join(f"{results[transport][name]:>16.1f}" for transport in transports))


def measure(transport: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Medians of rank 0, by what was measured."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--rank", str(rank), "--transport", transport]
                + ["--store", str(Path(folder) / "store")],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(arguments.num_ranks)
        ]
        outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"a rank of {transport} failed; its error stands above")
    lines = [line.rsplit(" ", 1) for line in outputs[0].splitlines()]
    return {name: float(value) for name, value in lines}


def run_rank(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    group = make_group(arguments)
    assert group.communicator is not None
    device, dtype = group.communicator.device, DTYPES[arguments.dtype]
    for name, num_bytes in SIZES.items():
        x = torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=device)
        report(arguments, f"all_reduce {name}", repeat(lambda x=x: group.all_reduce(x), group, device, arguments))
    x = torch.zeros(8, 1024, dtype=dtype, device=device)
    report(arguments, "all_gather 16 KB", repeat(lambda: group.all_gather(x), group, device, arguments))
    report(arguments, "ping-pong 16 KB", repeat(lambda: ping_pong(group, x), group, device, arguments))
    report(arguments, "barrier", repeat(group.barrier, group, device, arguments))
    group.barrier()
    sys.stdout.flush()
    os._exit(0)


def ping_pong(group: GroupCoordinator, x: torch.Tensor) -> None:
    """From rank 0 to rank 1 and back."""
    if group.rank_in_group == 0:
        group.send(x, 1)
        group.recv(x.shape, x.dtype, 1)
    elif group.rank_in_group == 1:
        group.recv(x.shape, x.dtype, 0)
        group.send(x, 0)


def make_group(arguments: argparse.Namespace) -> GroupCoordinator:
    rank, size = arguments.rank, arguments.num_ranks
    if arguments.transport != "Gloo":
        device = torch.device("cuda", rank) if arguments.transport == "NCCL" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dims = ParallelDims(tensor_size=size, rank=rank)
        return form_groups(dims, device=device, address="127.0.0.1", store_file=arguments.store).tensor
    meeting = Meeting(file_store(arguments.store, size), rank, size, timeout=60.0, generation=0, names={})
    meeting.arrive("127.0.0.1", {})
    store = torch.distributed.PrefixStore("gloo", meeting.store)
    names = [meeting.name(each) for each in range(size)]
    communicator = GlooCommunicator(store, rank, names, address="127.0.0.1", timeout=60.0, connect_timeout=60.0)
    return GroupCoordinator(range(size), rank, communicator, name="tensor")


def repeat(
    call: Callable[[], object], group: GroupCoordinator, device: torch.device, arguments: argparse.Namespace
) -> float:
    """Median microseconds of a call. On a GPU: of calls queued one after the other, as a step queues them."""
    group.barrier()
    for _ in range(10):
        call()
    if device.type == "cuda":
        return repeat_on_gpu(call, device, arguments.num_repeats)
    times = []
    for _ in range(arguments.num_repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def repeat_on_gpu(call: Callable[[], object], device: torch.device, num_repeats: int) -> float:
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(num_repeats):
        call()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / num_repeats * 1e6


def report(arguments: argparse.Namespace, name: str, value: float) -> None:
    if arguments.rank == 0:
        print(name, value)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
