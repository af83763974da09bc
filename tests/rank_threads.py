"""Ranks of a tensor-parallel group as threads of the test's own process: quick, and all results are at hand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from shoal.distributed.communicator import DeviceCommunicator, Transfer, tree_sum
from shoal.distributed.group import GroupCoordinator

SECONDS = 60.0
Result = TypeVar("Result")


class _Exchange:
    """Where the ranks put down what they bring, and wait for each other."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=SECONDS)
        self.slots: list[torch.Tensor] = [torch.empty(0)] * size


class ThreadCommunicator(DeviceCommunicator):
    """Sums are the fixed tree that shared memory has; calls counts collectives, by name and bytes of one rank."""

    kind = "threads"

    def __init__(self, exchange: _Exchange, rank: int) -> None:
        names = [f"rank {each}" for each in range(len(exchange.slots))]
        super().__init__(rank, names, torch.device("cpu"), SECONDS)
        self._exchange = exchange
        self.calls: list[tuple[str, int]] = []

    def _everyone(self, what: str, x: torch.Tensor) -> list[torch.Tensor]:
        self.calls.append((what, x.nbytes))
        self._exchange.slots[self.rank] = x.clone()
        self._exchange.barrier.wait()
        parts = list(self._exchange.slots)
        self._exchange.barrier.wait()
        assert all(part.shape == x.shape and part.dtype == x.dtype for part in parts), "ranks brought different tensors"
        return parts

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return tree_sum(self._everyone("all_reduce", x))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._everyone("all_gather", x))

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return tree_sum([part[self.rank] for part in self._everyone("reduce_scatter", x)])

    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        return self._everyone("broadcast", x)[source]

    def gather(self, x: torch.Tensor, destination: int) -> torch.Tensor | None:
        parts = self._everyone("gather", x)
        return torch.stack(parts) if destination == self.rank else None

    def isend(self, x: torch.Tensor, destination: int) -> Transfer:
        raise NotImplementedError("tensor-parallel ranks send nothing to one another")

    def recv(self, x: torch.Tensor, source: int) -> torch.Tensor:
        raise NotImplementedError("tensor-parallel ranks receive nothing from one another")

    def barrier(self) -> None:
        self._exchange.barrier.wait()

    def close(self) -> None:
        self._exchange.barrier.abort()


def on_ranks(size: int, work: Callable[[GroupCoordinator], Result]) -> list[Result]:
    """work(group) on each rank at the same time -> the results by rank. The first error of a rank is raised here."""
    exchange = _Exchange(size)

    def run(rank: int) -> Result:
        group = GroupCoordinator([0], 0, name="tensor")
        if size > 1:
            group = GroupCoordinator(range(size), rank, ThreadCommunicator(exchange, rank), name="tensor")
        try:
            return work(group)
        except BaseException:
            exchange.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]
