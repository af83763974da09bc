"""The status records of ranks, written and read through shared memory, and the sentence made of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.status import GROUPS, MOST_EXPERTS, OPERATIONS, PHASES, StatusBoard, StatusRecord, describe_stall

ALL_REDUCE, GATHER, SEND, RECV = (OPERATIONS.index(name) for name in ("all_reduce", "gather", "send", "recv"))
TENSOR, PIPELINE = GROUPS.index("tensor"), GROUPS.index("pipeline")


def board_of(num_ranks: int, **sizes: int) -> tuple[StatusBoard, list[StatusRecord]]:
    board = StatusBoard.create(num_ranks)
    dims = [ParallelDims(rank=rank, **(sizes or {"tensor_size": num_ranks})) for rank in range(num_ranks)]
    return board, [board.record(each, each.rank) for each in dims]


def test_tokens_of_experts() -> None:
    board, records = board_of(2)
    records[1].set_experts(3, [5, 0, 2**40])
    records[0].set_experts(0, [1] * (MOST_EXPERTS + 1))  # too many to tell
    first, second = board.read()
    assert (first.first_expert, first.expert_tokens) == (0, ())
    assert (second.first_expert, second.expert_tokens) == (3, (5, 0, 2**40))


@given(st.integers(0, 2**63), st.integers(0, 2**63), st.sampled_from(PHASES), st.integers(-1, 2**31 - 1))
def test_what_is_written_is_read(generation: int, step: int, phase: str, layer: int) -> None:
    board, records = board_of(2)
    records[1].update(generation=generation, step=step, phase=phase)
    records[1].enter_layer(layer)
    records[1].update(step=step)
    records[1].add_busy(0.25)
    records[1].add_busy(0.5)
    first, second = board.read()
    assert (first.rank, first.phase, first.layer, first.groups) == (0, "new", -1, {})
    assert (second.generation, second.step, second.phase, second.layer) == (generation, step, phase, layer)
    assert second.pid == os.getpid() and second.tensor_size == 2
    assert (first.busy_seconds, second.busy_seconds) == (0.0, 0.75)


def test_time_in_collectives_and_memory_add_up() -> None:
    board, records = board_of(1)
    assert (board.read()[0].collective_seconds, board.read()[0].host_bytes) == (0.0, 0)
    records[0].set_memory(1 << 40, 2 << 40)
    for group in (TENSOR, PIPELINE, TENSOR):
        records[0].enter(group, ALL_REDUCE)
        time.sleep(0.002)
        records[0].leave(group)
    (found,) = board.read()
    assert (found.host_bytes, found.device_bytes, found.num_collectives) == (1 << 40, 2 << 40, 3)
    assert 0.006 <= found.collective_seconds < 60 and 0 <= found.seconds_since_progress < 60
    records[0].set_memory(5, 6)
    assert board.read()[0].collective_seconds == found.collective_seconds


def test_another_process_reads_it_and_ranks_that_never_came_have_none() -> None:
    board = StatusBoard.create(3)
    record = board.record(ParallelDims(rank=2, tensor_size=3), 1)
    record.enter(TENSOR, ALL_REDUCE)
    program = (
        "import sys; from shoal.distributed.status import StatusBoard, describe_stall\n"
        "print(describe_stall(StatusBoard.open(sys.argv[1]).read()))"
    )
    command = [sys.executable, "-c", program, board.address]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output == "rank 2 waits in all_reduce 1 (tensor); what ranks 0 and 1 do is not known here\n" or (
        output.startswith("rank 2 waits for ") and output.endswith("what ranks 0 and 1 do is not known here\n")
    )
    with pytest.raises(ValueError, match="no record 3"):
        board.record(ParallelDims(rank=0, tensor_size=3), 3)


def test_who_waits_and_who_never_entered() -> None:
    board, records = board_of(4)
    for _ in range(811):
        for record in records:
            record.enter(TENSOR, ALL_REDUCE)
            record.leave(TENSOR)
    for rank in (0, 2, 3):
        records[rank].enter(TENSOR, ALL_REDUCE)
    records[1].update(step=40, phase="forward")
    records[1].enter_layer(3)
    assert describe_stall(board.read()) == (
        "ranks 0, 2 and 3 wait in all_reduce 812 (tensor); rank 1 never entered it; "
        f"rank 1 (pid {os.getpid()}) is in step 40, phase forward, layer 3"
    )


def test_who_left_already() -> None:
    board, records = board_of(3)
    for rank, record in enumerate(records):
        record.enter(TENSOR, GATHER)
        if rank:
            record.leave(TENSOR)
    records[2].enter(TENSOR, ALL_REDUCE)
    assert describe_stall(board.read()) == (
        "rank 0 waits in gather 1 (tensor); ranks 1 and 2 left it already; "
        "rank 2 waits in all_reduce 2 (tensor); ranks 0 and 1 never entered it; "
        f"rank 1 (pid {os.getpid()}) is in step 0, phase new"
    )


def test_a_receive_names_its_peer_and_the_group_that_keeps_that_one() -> None:
    """Stage 1 waits for stage 0, whose ranks wait for each other: the first cause is there to be read."""
    board, records = board_of(4, pipeline_size=2, tensor_size=2)
    records[2].enter(PIPELINE, RECV, 0)
    records[3].enter(PIPELINE, SEND, 1)
    records[0].enter(TENSOR, ALL_REDUCE)
    assert describe_stall(board.read()) == (
        "rank 2 waits in recv from rank 0; rank 3 waits in send to rank 1; "
        f"rank 1 (pid {os.getpid()}) is in step 0, phase new; "
        "rank 0 waits in all_reduce 1 (tensor); rank 1 never entered it"
    )


def test_who_is_behind_where_collectives_are_only_queued() -> None:
    board, records = board_of(3)
    for rank, number in enumerate((5, 4, 5)):
        for _ in range(number):
            records[rank].enter(TENSOR, ALL_REDUCE)
            records[rank].leave(TENSOR)
    assert describe_stall(board.read()).startswith(
        "no rank waits in a collective; rank 1 has begun 4 collectives (tensor), others 5; rank 0 "
    )


def test_nobody_waits() -> None:
    board, records = board_of(1, tensor_size=1)
    records[0].update(step=9, phase="sample")
    pid = os.getpid()
    assert (
        describe_stall(board.read()) == f"no rank waits in a collective; rank 0 (pid {pid}) is in step 9, phase sample"
    )
    assert describe_stall([]) == "no rank has left a status record"
