"""Which sum goes which way: chosen from times, taken by size, and left to the communicator where nothing is shared."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shoal.distributed.communicator import SmallReducer
from shoal.distributed.group import GroupCoordinator
from shoal.kernels.small_reducer import MeasuredReducer, attach_small_reducer, choose
from tests.rank_threads import on_ranks

SIZES = (16, 64, 256, 1024)
INF = float("inf")


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([(5, 7, 15), (6, 7, 15), (9, 8, 16), (30, 20, 20)], (64, 1024)),
        ([(5, 7, 15), (6, 7, 15), (9, 8, 16), (30, 25, 20)], (64, 256)),
        ([(5, 7, 15), (6, 7, 15), (9, 10, 16), (30, 25, 20)], (256, 256)),
        ([(20, 21, 15), (6, 7, 15), (9, 8, 16), (30, 20, 20)], (0, 0)),
        ([(7, 5, 15), (6, 7, 15), (9, 8, 16), (30, 20, 21)], (64, 1024)),
        ([(5, 7, 15), (INF, 7, 15), (INF, INF, 16), (1, 1, 2)], (16, 64)),
        # A little slower at the smallest size is noise; two-shot must not live on one-shot's merit.
        ([(5, 4.8, 10), (6, 9, 8), (20, 21, 12), (30, 30, 20)], (64, 64)),
        ([(5, 4.7, 10), (9, 6, 8), (20, 13, 12), (30, 30, 20)], (0, 64)),
    ],
)
def test_each_way_is_taken_from_the_smallest_size_on(times: list[tuple[float, ...]], expected: tuple[int, int]) -> None:
    assert choose(SIZES, times) == expected


class FakeKernels:
    """Says what it was asked; a tensor of an odd number of elements does not fit."""

    def fits(self, x: torch.Tensor, two_shot: bool = False) -> bool:
        return x.numel() % 2 == 0

    fits_rows = fits_gather = fits

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(2, *x.shape)

    def all_reduce(self, x: torch.Tensor, two_shot: bool) -> torch.Tensor:
        return x.fill_(2.0 if two_shot else 1.0)

    def all_reduce_add_norm(self, x, residual, weight, eps, two_shot):
        return torch.full_like(x, 4.0 if two_shot else 3.0), x


def test_sizes_decide() -> None:
    reducer = MeasuredReducer(FakeKernels(), 400, 4000)
    small, middle, large, odd = (torch.zeros(count) for count in (100, 1000, 1002, 99))
    assert reducer.all_reduce(small)[0] == 1 and reducer.all_reduce(middle)[0] == 2
    assert reducer.takes(small) and reducer.takes(middle) and not reducer.takes(large) and not reducer.takes(odd)
    assert reducer.takes_rows(middle) and not reducer.takes_rows(large)
    assert reducer.takes_gather(small[:50]) and not reducer.takes_gather(small)
    assert reducer.all_gather(small).shape == (2, 100)
    assert reducer.all_reduce_add_norm(small, None, small, 0.0)[0][0] == 3
    assert reducer.all_reduce_add_norm(middle, None, middle, 0.0)[0][0] == 4


class Doubler(SmallReducer):
    """Stands for a sum over two ranks that hold the same."""

    def takes(self, x: torch.Tensor) -> bool:
        return x.numel() <= 64

    takes_rows = takes_gather = takes

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, -x])

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)

    def all_reduce_add_norm(self, x, residual, weight, eps):
        total = x * 2 if residual is None else x * 2 + residual
        return total * 100, total

    def describe(self) -> str:
        return "doubles"


def test_a_group_sums_through_what_is_attached_and_the_rest_by_itself() -> None:
    def work(group: GroupCoordinator) -> list[torch.Tensor]:
        x, weight = torch.arange(64.0).view(4, 16), torch.rand(16, generator=torch.Generator().manual_seed(0))
        wide = torch.arange(160.0).view(10, 16) + group.rank_in_group
        before = group.all_reduce_add_norm(x.clone(), x, weight, 1e-5)
        group.attach(Doubler())
        return [
            *before,
            group.all_reduce(x.clone()),
            *group.all_reduce_add_norm(x.clone(), x, weight, 1e-5),
            group.all_gather(x, 0),
            group.all_gather(wide, 0),
            *group.all_reduce_add_norm(wide.clone(), None, weight, 1e-5),
            *group.all_reduce_add_norm(wide.clone(), -wide, weight, 1e-5, lambda total, residual: (total, residual)),
        ]

    x, weight = torch.arange(64.0).view(4, 16), torch.rand(16, generator=torch.Generator().manual_seed(0))
    total = x * 3
    for rank, results in enumerate(on_ranks(2, work)):
        torch.testing.assert_close(results[0], F.rms_norm(total, (16,), weight, 1e-5))
        assert torch.equal(results[1], total)
        assert (
            torch.equal(results[2], x * 2) and torch.equal(results[3], total * 100) and torch.equal(results[4], total)
        )
        assert torch.equal(results[5], torch.cat([x, -x]))
        wide = torch.arange(160.0).view(10, 16)
        assert torch.equal(results[6], torch.cat([wide, wide + 1]))
        wide = wide * 2 + 1
        torch.testing.assert_close(results[7], F.rms_norm(wide, (16,), weight, 1e-5))
        assert torch.equal(results[8], wide)
        # What was given for it comes in the place of plain torch.
        assert torch.equal(results[9], wide) and torch.equal(results[10], -torch.arange(160.0).view(10, 16) - rank)


def test_a_group_of_one_only_adds() -> None:
    group = GroupCoordinator([0], 0, name="tensor")
    x, weight = torch.randn(3, 16), torch.rand(16)
    normed, total = group.all_reduce_add_norm(x, x, weight, 1e-5)
    assert torch.equal(total, x + x) and torch.equal(normed, F.rms_norm(x + x, (16,), weight, 1e-5))
    assert attach_small_reducer(group) == "one rank: nothing to sum" and group.reducer is None


def test_without_shared_memory_a_group_stays_as_it_is() -> None:
    def work(group: GroupCoordinator) -> str:
        reason = attach_small_reducer(group)
        assert group.reducer is None
        return reason

    for reason in on_ranks(2, work):
        assert "do not share the memory of their GPUs" in reason
