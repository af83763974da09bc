"""What moves tensors between the ranks of one group: the base of the NCCL, Gloo and shared-memory communicators.

Only `GroupCoordinator` calls it. Ranks are positions in the group here; all ranks make the same calls in the same
order, with tensors of the same shape and type.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import torch

_HALF_TYPES = (torch.bfloat16, torch.float16)


class Transfer:
    """A send under way. Its tensor must not change before `wait` has returned.

    goes_on_alone: False where the rest is sent only while this rank waits here, or for anything else in the group.
    """

    def __init__(self, finish: Callable[[], object] | None = None, *, goes_on_alone: bool = True) -> None:
        self._finish = finish
        self.goes_on_alone = goes_on_alone

    def wait(self) -> None:
        if self._finish is not None:
            self._finish()
            self._finish = None


class PendingSum:
    """A sum over ranks that may be under way while this rank computes something else."""

    def __init__(self, result: torch.Tensor, finish: Callable[[], object] | None = None) -> None:
        self._result = result
        self._finish = finish

    @property
    def is_over(self) -> bool:
        """Whether it has been waited for."""
        return self._finish is None

    def wait(self) -> torch.Tensor:
        """The sum. On a GPU the current stream waits for it, not the host."""
        if self._finish is not None:
            self._finish()
            self._finish = None
        return self._result


class DeviceCommunicator(abc.ABC):
    """names: how errors call the ranks of the group. Any method may raise CollectiveError; the group is broken then."""

    kind: str
    # Whether a sum goes on beside this rank's own computation (`start_all_reduce`).
    overlaps: bool = False

    def __init__(self, rank: int, names: Sequence[str], device: torch.device, timeout: float) -> None:
        """timeout: seconds that one operation may take."""
        self.rank = rank
        self.size = len(names)
        self.names = list(names)
        self.device = device
        self.timeout = timeout

    @abc.abstractmethod
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in x where x is contiguous. Half-precision types are summed in fp32 on the CPU."""

    def start_all_reduce(self, x: torch.Tensor) -> PendingSum:
        """As `all_reduce`; x must not be touched until the sum has been waited for."""
        return PendingSum(self.all_reduce(x))

    @abc.abstractmethod
    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [...] of every rank -> [ranks, ...]."""

    @abc.abstractmethod
    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """x [ranks, ...] -> the sum over the ranks of their x[rank]."""

    @abc.abstractmethod
    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """x of rank `source`, in x where x is contiguous."""

    @abc.abstractmethod
    def gather(self, x: torch.Tensor, destination: int) -> torch.Tensor | None:
        """x [...] of every rank -> [ranks, ...] on rank `destination`, None on the others."""

    @abc.abstractmethod
    def isend(self, x: torch.Tensor, destination: int) -> Transfer:
        """Start to send x; sends to one rank arrive in their order."""

    @abc.abstractmethod
    def recv(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """Fill x, which is contiguous, with the next tensor from rank `source`. Both know type and shape."""

    @abc.abstractmethod
    def barrier(self) -> None:
        """Return when all ranks have come."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give back what this rank holds, without a word to the others: they may still be at work."""

    def all_reduce_tree(self, x: torch.Tensor) -> torch.Tensor:
        """As `all_reduce`, but summed as `tree_sum` does, whatever the transport."""
        return tree_sum(list(self.all_gather(x)))


class SmallReducer(abc.ABC):
    """Sums and gathers small tensors over the ranks of one host faster than the communicator; see
    `GroupCoordinator.attach`.

    What it takes depends on shapes and types alone, so all ranks decide alike. Sums have the same bits on all ranks.
    """

    @abc.abstractmethod
    def takes(self, x: torch.Tensor) -> bool:
        """Whether `all_reduce` serves for x."""

    @abc.abstractmethod
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in x, added in fp32 and rounded once."""

    @abc.abstractmethod
    def takes_rows(self, x: torch.Tensor) -> bool:
        """Whether `all_reduce_add_norm` serves for x [T, H]."""

    @abc.abstractmethod
    def all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `GroupCoordinator.all_reduce_add_norm`; the total is rounded once."""

    @abc.abstractmethod
    def takes_gather(self, x: torch.Tensor) -> bool:
        """Whether `all_gather` serves for x."""

    @abc.abstractmethod
    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [...] of every rank -> [ranks, ...], bit for bit."""

    @abc.abstractmethod
    def describe(self) -> str:
        """What is summed how, and why, in one line."""


class LargeReducer(abc.ABC):
    """Sums large tensors over the ranks of one host while these compute something else, better than the communicator;
    see `GroupCoordinator.attach_large`. As of SmallReducer: shapes and types decide, all ranks get the same bits.
    """

    @abc.abstractmethod
    def takes(self, x: torch.Tensor) -> bool:
        """Whether `start` serves for x."""

    @abc.abstractmethod
    def start(self, x: torch.Tensor) -> PendingSum:
        """The sum over the ranks, added in fp32 and rounded once; x stays as it is, to be left alone until `wait`.

        It lies in memory of the reducer's own: use it before the next but one is begun.
        """

    @abc.abstractmethod
    def takes_rows(self, x: torch.Tensor) -> bool:
        """Whether `start_add_norm` serves for x [T, H]."""

    @abc.abstractmethod
    def own_rows(self, num_rows: int) -> slice:
        """Those of which this rank makes the totals."""

    @abc.abstractmethod
    def start_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
    ) -> PendingSum:
        """As `start`, of RMSNorm(total) [T, H] of total = the ranks' x [T, H] + residual; weight [H] of x's type.

        residual: its `own_rows` alone, in which those of the total come to stand. Without a weight the total itself is
        the result, and the residual stays.
        """


def tree_sum(parts: Sequence[torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of tensors of one shape as a fixed tree of neighbours: ((0+1)+(2+3))+…; an odd last one goes up a level.

    So the sum of 2^m neighbours, summed alone first, is a node of the tree. Half-precision types are summed in fp32 and
    rounded once.
    """
    if len(parts) == 1:
        return parts[0].clone() if out is None else out.copy_(parts[0])
    dtype = parts[0].dtype
    # Two halves are added in fp32 and rounded once by the kernel itself.
    if dtype in _HALF_TYPES and len(parts) > 2:
        total = tree_sum([part.float() for part in parts])
        return total.to(dtype) if out is None else out.copy_(total)
    while len(parts) > 2:
        rest = parts[len(parts) & ~1 :]
        parts = [*(left + right for left, right in zip(parts[::2], parts[1::2], strict=False)), *rest]
    return torch.add(parts[0], parts[1], out=out)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory as uint8 [bytes]."""
    return x.reshape(-1).view(torch.uint8)
