from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.config.parallel import ParallelConfig
from shoal.executor.ray_placement import NodeRoom, describe_room, place_ranks


def nodes(*free: int, total: int = 8) -> list[NodeRoom]:
    return [
        NodeRoom(node_id=f"id{number}", address=f"10.0.0.{number}", hostname=f"node{number}", free=room, total=total)
        for number, room in enumerate(free, 1)
    ]


def place(free: list[NodeRoom], tensor: int, pipeline: int, driver: int = 1) -> list[int] | None:
    """The number of each rank's node."""
    places = place_ranks(free, ParallelConfig(tensor_size=tensor, pipeline_size=pipeline), f"10.0.0.{driver}")
    return None if places is None else [int(node.hostname.removeprefix("node")) for node in places]


def test_stages_are_spread_and_groups_are_packed():
    assert place(nodes(4, 4), tensor=4, pipeline=2) == [1] * 4 + [2] * 4
    assert place(nodes(2, 2), tensor=2, pipeline=2) == [1, 1, 2, 2]
    assert place(nodes(1, 1, 1), tensor=1, pipeline=3) == [1, 2, 3]
    # With room for all on one node, stages still get machines of their own.
    assert place(nodes(8, 8), tensor=2, pipeline=2) == [1, 1, 2, 2]
    assert place(nodes(8, 8), tensor=1, pipeline=4) == [1, 2, 1, 2]


def test_the_first_stage_is_where_the_core_is():
    assert place(nodes(4, 4), tensor=2, pipeline=2, driver=2) == [2, 2, 1, 1]
    assert place(nodes(8, 8, 2), tensor=2, pipeline=1, driver=3) == [3, 3]
    assert place(nodes(4, 1), tensor=2, pipeline=1, driver=2) == [1, 1], "but only when it has room"


def test_a_group_that_fits_no_node_is_shared():
    assert place(nodes(1, 1), tensor=2, pipeline=1) == [1, 2]
    assert place(nodes(3, 3), tensor=4, pipeline=1, driver=2) == [2, 2, 2, 1]
    assert place(nodes(2, 2, 2), tensor=3, pipeline=2) == [1, 1, 2, 3, 3, 2]


def test_no_room():
    assert place(nodes(1, 2), tensor=2, pipeline=2) is None
    assert place([], tensor=1, pipeline=1) is None
    said = describe_room(nodes(8, 2, 0), "GPU")
    assert said == (
        "node1 (10.0.0.1) has 8 GPUs, all free; node2 (10.0.0.2) has 8 GPUs, 2 of them free; "
        "node3 (10.0.0.3) has 8 GPUs, 0 of them free"
    )
    assert describe_room([], "CPU") == "there is no node"


@given(st.lists(st.integers(0, 8), max_size=6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6))
def test_every_rank_gets_a_place_when_there_are_enough(free, tensor, pipeline, driver):
    rooms = nodes(*free)
    places = place(rooms, tensor, pipeline, driver)
    assert (places is not None) == (sum(free) >= tensor * pipeline)
    if places is not None:
        assert len(places) == tensor * pipeline
        assert all(places.count(number) <= room for number, room in enumerate(free, 1))
        # A stage is cut over nodes only when no node had room for all of it.
        left = dict(enumerate(free, 1))
        for stage in range(pipeline):
            group = places[stage * tensor : (stage + 1) * tensor]
            assert len(set(group)) == 1 or max(left.values()) < tensor
            for number in group:
                left[number] -= 1
