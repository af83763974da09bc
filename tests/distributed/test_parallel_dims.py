"""The rank grid: every rank has one place, groups partition the ranks, shares add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.distributed.parallel_dims import ParallelDims
from shoal.errors import ConfigError

sizes = st.integers(1, 5)


@given(sizes, sizes, sizes)
def test_coordinates_and_groups(data: int, pipeline: int, tensor: int) -> None:
    world = data * pipeline * tensor
    grid = [
        ParallelDims(data_size=data, pipeline_size=pipeline, tensor_size=tensor, rank=rank) for rank in range(world)
    ]
    for rank, dims in enumerate(grid):
        assert dims.rank_at(dims.data_rank, dims.pipeline_rank, dims.tensor_rank) == rank
        for group, size in (
            (dims.tensor_group(), tensor),
            (dims.pipeline_group(), pipeline),
            (dims.data_group(), data),
        ):
            assert len(set(group)) == size and rank in group and all(0 <= other < world for other in group)
        assert dims.tensor_group() == list(range(dims.tensor_group()[0], dims.tensor_group()[0] + tensor))
        assert all(grid[other].pipeline_rank == dims.pipeline_rank for other in dims.tensor_group())
        assert [grid[other].pipeline_rank for other in dims.pipeline_group()] == list(range(pipeline))
        assert (dims.is_first_stage, dims.is_last_stage) == (
            dims.pipeline_rank == 0,
            dims.pipeline_rank == pipeline - 1,
        )


def test_layers_by_hand() -> None:
    ranges = [ParallelDims(pipeline_size=3, rank=rank).layer_range(32, [10, 11, 11]) for rank in range(3)]
    assert ranges == [range(0, 10), range(10, 21), range(21, 32)]
    for wrong in ([16, 16], [32, 0, 0], [10, 10, 10]):
        with pytest.raises(ConfigError, match="must give each of 3 stages at least one layer, 32 in all"):
            ParallelDims(pipeline_size=3).layer_range(32, wrong)


def test_shares() -> None:
    dims = ParallelDims(tensor_size=4, rank=2)
    assert dims.tensor_slice(32, "attention heads") == slice(16, 24)
    with pytest.raises(
        ConfigError, match=r"attention heads \(14\) cannot be split over 4 ranks; these work: \[1, 2, 7, 14\]"
    ):
        dims.tensor_slice(14, "attention heads")
    assert dims.kv_head_slice(8) == slice(4, 6)
    assert [ParallelDims(tensor_size=4, rank=rank).kv_head_slice(2) for rank in range(4)] == [
        slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="3 KV heads cannot be split or copied evenly over 4 ranks"):
        dims.kv_head_slice(3)


def test_impossible_grids() -> None:
    with pytest.raises(ConfigError, match="tensor_size must be 1 or more; got 0"):
        ParallelDims(tensor_size=0)
    with pytest.raises(ConfigError, match="rank 4 is outside the grid of 4 ranks"):
        ParallelDims(data_size=2, tensor_size=2, rank=4)
