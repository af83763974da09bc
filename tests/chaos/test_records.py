"""The records of long runs: written line by line, read again after any end, and summed up."""

from __future__ import annotations

import pytest

from tests.chaos import records
from tests.chaos.cases import Case
from tests.chaos.client import Outcome
from tests.chaos.faults import ALL_KINDS
from tests.chaos.harness import Plan, kind_of, wait_of
from tests.chaos.records import FaultRecord


def record(number, kind="drain", **more):
    return FaultRecord(number=number, kind=kind, engine="fake", seed=1, victim="replica0", **more)


def test_a_line_that_was_cut_off_is_made_again(tmp_path):
    path = tmp_path / "run.jsonl"
    assert records.read(path) == []
    for number in range(3):
        records.append(path, record(number))
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert [one.number for one in records.read(path)] == [0, 1]
    records.append(path, record(2))
    assert path.read_bytes() == whole


def test_the_table_has_a_line_for_each_kind():
    lines = records.table(
        [
            record(0, next_token=[0.1, 0.3, 0.2], carried=5, moved=5, back=1.0),
            record(1, next_token=[0.9], carried=2, failures=["x"]),
            record(2, "hang"),
        ]
    ).split("\n")
    assert lines[2] == "| drain | 2 | 7 | 5 | 1 | 0.25 | 0.90 | 1.00 |"
    assert lines[3] == "| hang | 1 | 0 | 0 | 0 | – | – | – |"


def test_failures_and_leaks_are_told():
    text = records.summary([record(4, checked=9, failures=["case 3: text"])], ["process 7"])
    assert "1 faults, 9 requests checked, 1 failures" in text
    assert "fault 4 (drain): case 3: text" in text and "left behind: process 7" in text


def test_every_kind_comes_once_before_any_comes_again():
    plan = Plan(seed=5)
    order = [kind_of(plan, number) for number in range(3 * len(ALL_KINDS))]
    turns = [order[turn * len(ALL_KINDS) : (turn + 1) * len(ALL_KINDS)] for turn in range(3)]
    assert all(sorted(turn) == sorted(ALL_KINDS) for turn in turns) and turns[0] != turns[1]


@pytest.mark.parametrize(
    ("times", "wait"),
    [
        ([9.0, 12.0, 12.1], 2.0),
        ([10.05, 10.25, 12.5, 12.6], 2.25),
        ([10.05, 10.25, 10.35, 14.0], 0.2),
        ([9.0, 9.9], None),
    ],
    ids=["silent at once", "some were on their way", "a later pause is not the fault's", "nothing was to come"],
)
def test_the_wait_for_the_next_token(times, wait):
    outcome = Outcome(Case(0, "/v1/completions", {"stream": True}), "chaos-0", 1.0, times=times)
    found = wait_of(outcome, struck=10.0, begun=10.2)
    assert found == (None if wait is None else pytest.approx(wait))
