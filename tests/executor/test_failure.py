"""What is told of several failures at once."""

from __future__ import annotations

import pytest

from shoal.executor.failure import Evidence, explain_stall


def describe(rank: int) -> str:
    return f"rank {rank} (node{rank // 2})"


@pytest.mark.parametrize(
    ("exits", "told"),
    [
        ({2: "went with node 1: it is down", 3: "went with node 1: it is down"},
         "rank 2 (node1) went with node 1: it is down; so too rank 3 (node1)"),
        ({0: "was killed by signal 9", 3: "ended with exit code 1"},
         "rank 0 (node0) was killed by signal 9; rank 3 (node1) ended with exit code 1"),
    ],
)  # fmt: skip
def test_what_several_ranks_have_in_common_is_told_once(exits, told):
    evidence = Evidence(describe)
    for rank, how in exits.items():
        evidence.exited(rank, how)
    assert evidence.cause() == ("", told)


def test_a_rank_that_nothing_is_heard_of_comes_first_in_what_explains_a_stall():
    text = explain_stall([], {}, {3: 4.2}, describe)
    assert text.startswith("nothing was heard of rank 3 (node1) for 4 s: it is stopped")
