"""A group of one is free, dicts are described without pickle, sums are trees; and the public getters."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shoal.distributed as distributed
from shoal.distributed.communicator import tree_sum
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.rendezvous import form_groups, single_rank_groups
from shoal.distributed.tensor_dict import FIRST_BYTES, describe, pack, rest_bytes, unpack
from shoal.errors import ConfigError, ShoalError
from tests.rank_threads import ThreadCommunicator, on_ranks


def test_a_group_of_one_returns_its_input() -> None:
    groups = form_groups(ParallelDims(), device=torch.device("cpu"), address="127.0.0.1")
    x = torch.randn(4, 6)
    for group in (groups.world, groups.tensor, groups.pipeline, groups.data):
        assert group.world_size == 1 and group.rank_in_group == 0
        for result in (
            group.all_reduce(x),
            group.all_gather(x),
            group.reduce_scatter(x),
            group.broadcast(x),
            group.gather(x),
        ):
            assert result is x
        entries = {"x": x, "step": 3}
        assert group.broadcast_tensor_dict(entries) == entries
        group.barrier()
        with pytest.raises(ValueError, match="no other rank"):
            group.send(x)
    assert groups.status_address is not None and [record.rank for record in groups.host_status()] == [0]
    groups.close()


def test_one_rank_needs_no_distributed_torch() -> None:
    program = (
        "import sys, torch; torch.distributed.is_available = None\n"
        "from shoal.distributed.rendezvous import single_rank_groups\n"
        "single_rank_groups().tensor.all_reduce(torch.ones(2))\n"
        "assert not torch.distributed.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_package_and_the_grid_need_no_torch() -> None:
    program = (
        "import sys, shoal.distributed, shoal.distributed.parallel_dims, shoal.distributed.status\n"
        "assert 'torch' not in sys.modules\n"
        "from shoal.distributed import GroupCoordinator\n"
        "assert 'torch' in sys.modules and GroupCoordinator.__name__ == 'GroupCoordinator'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_getters_answer_for_the_registered_groups() -> None:
    assert not distributed.model_parallel_is_initialized()
    with pytest.raises(ShoalError, match="no parallel groups"):
        distributed.get_tensor_model_parallel_rank()
    groups = single_rank_groups()
    distributed.set_parallel_groups(groups)
    try:
        assert distributed.model_parallel_is_initialized()
        assert distributed.get_tensor_model_parallel_rank() == distributed.get_pipeline_model_parallel_rank() == 0
        assert distributed.get_tensor_model_parallel_world_size() == 1
        assert distributed.get_pipeline_model_parallel_world_size() == 1
        assert (distributed.get_data_parallel_rank(), distributed.get_data_parallel_world_size()) == (0, 1)
        assert distributed.get_tp_group() is groups.tensor and distributed.get_pp_group() is groups.pipeline
        # They are the numbers of the grid, whatever it is.
        groups.dims = ParallelDims(data_size=2, pipeline_size=3, tensor_size=4, rank=17)
        assert distributed.get_tensor_model_parallel_rank() == 1
        assert distributed.get_tensor_model_parallel_world_size() == 4
        assert distributed.get_pipeline_model_parallel_rank() == 1
        assert distributed.get_pipeline_model_parallel_world_size() == 3
        assert (distributed.get_data_parallel_rank(), distributed.get_data_parallel_world_size()) == (1, 2)
    finally:
        distributed.set_parallel_groups(None)
    with pytest.raises(AttributeError):
        distributed.nothing_of_the_kind  # noqa: B018


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="not in the group"):
        GroupCoordinator([0, 1], 2)
    with pytest.raises(ValueError, match="communicator"):
        GroupCoordinator([0, 1], 0)
    with pytest.raises(ConfigError, match="a place to meet"):
        form_groups(ParallelDims(tensor_size=2), device=torch.device("cpu"), address="127.0.0.1")
    with pytest.raises(ValueError, match="power of two"):
        GroupCoordinator([0], 0).all_reduce_tree(torch.ones(3, 2))


@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 1000))
def test_neighbours_summed_first_are_a_node_of_the_tree(log_ranks: int, log_shards: int, seed: int) -> None:
    """So the bits do not depend on how many ranks hold the shards."""
    num_ranks, num_shards = 1 << log_ranks, 1 << log_shards
    generator = torch.Generator().manual_seed(seed)
    shards = torch.randn(num_ranks * num_shards, 5, generator=generator) * 1e3
    by_rank = [tree_sum(list(part)) for part in shards.chunk(num_ranks)]
    assert torch.equal(tree_sum(by_rank), tree_sum(list(shards)))


@given(st.integers(1, 9), st.sampled_from([torch.bfloat16, torch.float16]), st.integers(0, 1000))
def test_halves_are_summed_in_fp32(num_parts: int, dtype: torch.dtype, seed: int) -> None:
    parts = list(torch.randn(num_parts, 33, generator=torch.Generator().manual_seed(seed)).to(dtype))
    originals = [part.clone() for part in parts]
    assert torch.equal(tree_sum(parts), tree_sum([part.float() for part in parts]).to(dtype))
    assert all(torch.equal(part, original) for part, original in zip(parts, originals, strict=True))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(max_size=2000), values, max_size=8))
def test_values_of_a_dict_come_back_equal(entries: dict[str, object]) -> None:
    spec = describe({**entries, "a tensor": torch.ones(2, 0, 3, dtype=torch.bfloat16)})
    first, rest = pack(spec)
    assert first.shape == (FIRST_BYTES,) and rest.shape == (rest_bytes(first),)
    received = unpack(first, rest)
    assert received == spec
    tensor = received.tensors["a tensor"].empty(torch.device("cpu"))
    assert tensor.dtype is torch.bfloat16 and tensor.shape == (2, 0, 3)


def test_what_msgspec_cannot_write_is_refused() -> None:
    with pytest.raises(TypeError):
        pack(describe({"lock": object()}))


def test_where_sums_are_quick_nothing_is_done_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThreadCommunicator, "overlaps", True)

    x = torch.zeros(4)

    def work(group: GroupCoordinator) -> list[bool]:
        answers = [group.overlaps(x)]
        group.sums_are_quick = True
        return [*answers, group.overlaps(x)]

    assert on_ranks(2, work) == [[True, False]] * 2
    assert not GroupCoordinator([0], 0, name="tensor").overlaps(x)
