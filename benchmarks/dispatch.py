"""What it costs to give a step to workers and get its result back: real hub, ring, sockets and processes, no model.

`python benchmarks/dispatch.py` runs the workers on this host; `--two-hosts` puts half of them, the one that answers
among them, into a second network namespace, so that steps and results cross TCP, encrypted (needs root).

ms, 4 workers, 64 sequences, 2026-11, 2 cores (AMD EPYC) shared with other work, so that p99 says little: median | p99
    one host                  0.24 | 0.34
    two network namespaces    0.47 | 5
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shoal.config.engine_config import EngineConfig
from shoal.config.parallel import ParallelConfig
from shoal.config.resolve import make_engine_config
from shoal.executor.distributed import DistributedExecutor
from shoal.executor.launcher import WorkerLink
from shoal.executor.multiprocess import LocalLauncher
from shoal.messages import BatchResult, ScheduledBatch, SlotResult, SlotWork, WorkerSetup
from shoal.worker.__main__ import main as run_worker
from shoal.worker.process import OnProgress, Seat

ROOT = Path(__file__).parent.parent
TOKEN = "the-token-of-a-benchmark"


class EmptyRank:
    """Answers every step at once: token 7 for every slot."""

    is_asynchronous = False
    status_address = ""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self.is_output = rank == config.parallel.output_rank
        self._batch: ScheduledBatch | None = None

    def read_status(self) -> bytes:
        return b""

    def load(self, on_progress: OnProgress) -> tuple[int, dict[str, Any]]:
        return 1000, {}

    def allocate(self, num_blocks: int, on_progress: OnProgress) -> dict[str, Any]:
        return {}

    def execute(self, batch: ScheduledBatch) -> None:
        self._batch = batch

    def sample(self, step_id: int, grammar_masks: dict[int, bytes] | None) -> Callable[[], BatchResult]:
        batch = self._batch
        assert batch is not None
        return lambda: BatchResult(step_id, batch.generation, [SlotResult(work.slot, [7]) for work in batch.work])

    def idle(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


class EmptyLauncher(LocalLauncher):
    """Starts this file in the place of the worker; the last ranks in `other`, a second host, where there is one."""

    def __init__(self, config: EngineConfig, address: str | None, other: Any) -> None:
        super().__init__(config)
        self._address, self._other = address, other
        self._num_here = config.parallel.world_size // 2 if other is not None else config.parallel.world_size

    def listen_address(self) -> str | None:
        return self._address

    def token(self) -> str | None:
        return None if self._address is None else TOKEN

    def command(self, link: WorkerLink, rank: int) -> list[str]:
        command = [sys.executable, __file__, "--as-worker", *link.command(rank)[3:]]
        return command if rank < self._num_here else self._other.command(*command)


def main() -> None:
    if "--as-worker" in sys.argv:
        sys.argv.remove("--as-worker")
        os._exit(run_worker(make_rank))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-ranks", type=int, default=4)
    parser.add_argument("--num-seqs", type=int, default=64, help="sequences that decode in each step")
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--two-hosts", action="store_true", help="over TCP between two network namespaces")
    arguments = parser.parse_args()
    parallel = ParallelConfig(pipeline_size=arguments.num_ranks, backend="mp", startup_timeout=60.0, step_timeout=60.0)
    config = dataclasses.replace(make_engine_config(model="shoal-tiny", device="cpu"), parallel=parallel)
    with hosts(arguments.two_hosts) as (address, other, entered):
        executor = DistributedExecutor(config, EmptyLauncher(config, address, other))
        with entered:
            executor.start(lambda progress: None)
        try:
            seconds = measure(executor, arguments.num_seqs, arguments.num_steps)
        finally:
            executor.shutdown()
    seconds.sort()
    where = "two network namespaces" if arguments.two_hosts else "one host"
    print(f"{arguments.num_ranks} workers on {where}, {arguments.num_seqs} sequences, {os.cpu_count()} cores")
    print(f"a step and its result: median {statistics.median(seconds) * 1e3:.3f} ms, ", end="")
    print(f"p99 {seconds[len(seconds) * 99 // 100] * 1e3:.3f} ms")


def make_rank(setup: WorkerSetup, seat: Seat, on_progress: OnProgress) -> EmptyRank:
    return EmptyRank(EngineConfig.from_json(setup.config), seat.rank)


@contextlib.contextmanager
def hosts(two: bool) -> Iterator[tuple[str | None, Any, Any]]:
    """The address to listen on, the second host, and what makes this thread's sockets the first host's."""
    if not two:
        yield None, None, contextlib.nullcontext()
        return
    sys.path.insert(0, str(ROOT))
    from tests.namespaces import connected_hosts  # brings pytest

    with connected_hosts(2) as network:
        first, second = network.hosts
        yield first.address, second, first.entered()


def measure(executor: DistributedExecutor, num_seqs: int, num_steps: int) -> list[float]:
    """Seconds of each step, from `execute` to its result, one after the other; a first tenth is left out."""
    seconds = []
    for step_id in range(1, num_steps + num_steps // 10 + 1):
        work = [SlotWork(slot, 100 + step_id, 1, [], True) for slot in range(num_seqs)]
        batch = ScheduledBatch(step_id, 0, [], [], work)
        start = time.perf_counter()
        executor.execute(batch)
        result = executor.sample(step_id).result()
        seconds.append(time.perf_counter() - start)
        assert result.step_id == step_id and len(result.results) == num_seqs
    return seconds[num_steps // 10 :]


if __name__ == "__main__":
    main()
