"""What a sum over GPUs costs within a CUDA graph: microseconds by size, one-shot, two-shot and NCCL; and the sum joined
with the residual and RMSNorm against NCCL and a kernel for the rest. `python benchmarks/all_reduce.py --num-ranks 4`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.rendezvous import form_groups
from shoal.kernels.all_reduce import PeerKernels
from shoal.kernels.norm import add_rms_norm
from shoal.kernels.small_reducer import attach_small_reducer

KILOBYTES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
ROWS = ((1, 4096), (1, 8192), (8, 8192), (16, 8192), (32, 8192), (64, 4096), (64, 8192), (128, 8192), (256, 8192))
NUM_CALLS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(arguments.rank, arguments.num_ranks, arguments.store)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--num-ranks", str(arguments.num_ranks)]
        command += ["--store", str(Path(folder) / "store")]
        ranks = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(arguments.num_ranks)]
        try:
            failed = any([rank.wait() for rank in ranks])
        finally:
            for rank in ranks:
                rank.kill()
    if failed:
        raise SystemExit("a rank failed; its error stands above")


def run_rank(rank: int, size: int, store: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    groups = form_groups(
        ParallelDims(tensor_size=size, rank=rank), device=device, address="127.0.0.1", store_file=store
    )
    group = groups.tensor
    choice = attach_small_reducer(group)
    if group.memory is None or group.communicator is None:
        raise SystemExit(choice)
    kernels, nccl = PeerKernels(group.memory, 30.0), group.communicator
    say = print if rank == 0 else (lambda *_, **__: None)
    say(f"{size} × {torch.cuda.get_device_name(device)}, torch {torch.__version__}; µs, bf16, in a CUDA graph")
    say(f"chosen: {choice}")
    say(f"{'':>20}{'one-shot':>10}{'two-shot':>10}{'NCCL':>10}")
    for kilobytes in KILOBYTES:
        x = torch.zeros(kilobytes << 9, dtype=torch.bfloat16, device=device)
        row = [
            timed(lambda x=x, two=two: kernels.all_reduce(x, two)) if kernels.fits(x, two) else None
            for two in (False, True)
        ]
        row.append(timed(lambda x=x: nccl.all_reduce(x)))
        say(
            f"{kilobytes:>17} KB" + "".join(f"{'–' if value is None else f'{value:.1f}':>10}" for value in row),
            flush=True,
        )
    for num_rows, width in ROWS:
        x, residual = (torch.zeros(num_rows, width, dtype=torch.bfloat16, device=device) for _ in range(2))
        weight = torch.ones(width, dtype=torch.bfloat16, device=device)
        row = [
            timed(lambda x=x, r=residual, w=weight, two=two: kernels.all_reduce_add_norm(x, r, w, 1e-5, two))
            if kernels.fits_rows(x, two)
            else None
            for two in (False, True)
        ]
        row.append(timed(lambda x=x, r=residual, w=weight: add_rms_norm(nccl.all_reduce(x), r, w, 1e-5)))
        row.append(timed(lambda x=x, r=residual, w=weight: add_rms_norm(x, r, w, 1e-5)))
        text = "".join(f"{'–' if value is None else f'{value:.1f}':>10}" for value in row)
        say(f"norm of {num_rows:>3} × {width}{text} (norm alone last)", flush=True)
    torch.cuda.synchronize()
    group.barrier()
    os._exit(0)


def timed(call: Callable[[], object]) -> float:
    """Microseconds of a call: the best replay, as seen by this rank; a replay before brings the ranks together."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(NUM_CALLS):
            call()
    best = float("inf")
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1e3 / NUM_CALLS)
    graph.reset()
    return best


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
