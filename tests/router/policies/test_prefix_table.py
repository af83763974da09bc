"""The blocks that a backend should have: bounded, least recent first, and never a block without those before it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.router.policies.prefix_table import PrefixTable


def chain(document: int, length: int) -> list[int]:
    return [100 * document + index for index in range(length)]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.integers(0, 5), st.integers(0, 12)),
        st.tuples(st.just("finish"), st.integers(0, 10), st.sampled_from([None, 0.0, 1.0, 4.5, 12.0])),
    ),
    max_size=80,
)


@given(OPERATIONS, st.integers(1, 30))
def test_bounded_and_without_gaps(operations: list[tuple], max_blocks: int) -> None:
    table = PrefixTable(max_blocks)
    running: list[str] = []
    for number, operation in enumerate(operations):
        match operation:
            case ("start", document, length):
                table.start(str(number), chain(document, length))
                running.append(str(number))
                assert table.match(chain(document, length)) == min(length, max_blocks)
            case ("finish", index, num_cached) if running:
                table.finish(running.pop(index % len(running)), num_cached)
        assert len(table) <= max_blocks and 0 <= table.trust <= 1
        held = sum(table.match(chain(document, 12)) for document in range(6))
        assert held == len(table)  # every block that it holds is in the beginning of a chain


def test_the_least_recently_used_goes_first() -> None:
    table = PrefixTable(10)
    table.start("1", chain(1, 5))
    table.start("2", chain(2, 5))
    table.start("3", chain(1, 5))  # used again
    table.start("4", chain(3, 3))
    assert [table.match(chain(document, 5)) for document in (1, 2, 3)] == [5, 2, 3]


def test_what_a_request_brings_before_another_ends_is_kept() -> None:
    """An eviction that is found out takes what was used before the lost block, not what came since."""
    table = PrefixTable(100)
    for number in (1, 2, 3):
        table.start(f"old {number}", chain(number, 8))
        table.finish(f"old {number}", 0.0)
    table.start("again", chain(2, 8))
    table.start("new", chain(4, 8))
    table.finish("again", 0.0)
    assert [table.match(chain(document, 8)) for document in (1, 2, 3, 4)] == [0, 8, 8, 8]


def test_a_block_that_a_running_request_uses_says_nothing_of_older_ones() -> None:
    """It was lost before that request came, whose number would take back too much; trust falls all the same."""
    table = PrefixTable(100)
    for number in (1, 2):
        table.start(f"old {number}", chain(number, 8))
        table.finish(f"old {number}", 0.0)
    table.start("runs", chain(1, 8))
    table.start("again", chain(1, 8))
    table.finish("again", 0.0)
    assert [table.match(chain(document, 8)) for document in (1, 2)] == [8, 8]
    assert table.trust < 1


def test_blocks_with_a_gap_are_no_error() -> None:
    """As two hashes that collide would make: block 103 belongs to another chain, whose beginning is not here."""
    table = PrefixTable(100)
    table.start("1", [7, 8, 9, 103])
    table.start("2", chain(1, 5))
    table.finish("2", 0.0)
    table.finish("1", 0.0)
    assert table.match(chain(1, 5)) == 5


def test_unknown_requests_are_ignored() -> None:
    table = PrefixTable(10)
    table.finish("nobody", 3.0)
    assert len(table) == 0 and table.trust == 1.0
