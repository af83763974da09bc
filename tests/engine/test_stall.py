"""Ranks that stand still are told from ranks that get on, slowly or not."""

from __future__ import annotations

import pytest

from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.status import GROUPS, OPERATIONS, StatusBoard
from shoal.engine.stall import StallWatch, stall_limit

TENSOR, ALL_REDUCE = GROUPS.index("tensor"), OPERATIONS.index("all_reduce")


def test_the_limit_has_room_for_steps_that_show_nothing() -> None:
    assert stall_limit(5.0, 0.0) == 5.0
    assert stall_limit(5.0, 2.0) == 11.0
    assert stall_limit(0.0, 2.0) == 0.0


@pytest.mark.parametrize("sign", ["layer", "collective", "phase"])
def test_any_sign_of_any_rank_begins_anew(sign: str) -> None:
    board = StatusBoard.create(2)
    records = [board.record(ParallelDims(tensor_size=2, rank=rank), rank) for rank in range(2)]
    watch = StallWatch(1.0, 0.5)
    watch.begin()
    looks = []
    for turn in range(12):
        if turn == 3:
            match sign:
                case "layer":
                    records[1].enter_layer(4)
                case "collective":
                    records[0].enter(TENSOR, ALL_REDUCE)
                case "phase":
                    records[1].update(phase="sample")
        looks.append(watch.look(board.read(), 0.25))
    assert looks == [False] * 7 + [True] * 5


def test_a_watch_that_was_stopped_itself_does_not_jump_to_a_conclusion() -> None:
    watch = StallWatch(1.0, 0.5)
    watch.begin()
    assert [watch.look([], 100.0) for _ in range(3)] == [False, True, True]
    watch.begin()
    assert not watch.look([], 100.0)


def test_what_steps_take_is_no_time_without_progress() -> None:
    watch = StallWatch(3.0, 0.5, steps_take=2.0)
    watch.begin()
    seen = []
    for _ in range(6):
        watch.look([], 0.5)
        seen.append(watch.seconds_beyond_steps)
    assert seen == [0.0, 0.0, 0.0, 0.0, 0.5, 1.0]
    watch.begin()
    assert watch.seconds_beyond_steps == 0.0


def test_it_can_be_turned_off() -> None:
    watch = StallWatch(0.0, 0.5)
    watch.begin()
    assert not any(watch.look([], 0.5) for _ in range(1000))
