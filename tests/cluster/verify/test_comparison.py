"""What differs, decided without any file."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.cluster.verify.comparison import FileSums, compare_nodes, compare_with_list, relative_to

A, B, C = "a" * 64, "b" * 64, "c" * 64


def test_a_list_names_each_trouble() -> None:
    found = FileSums({"same": A, "other": B, "extra": C}, {"closed": "Permission denied", "extra closed": "I/O error"})
    verdicts = compare_with_list(found, {"same": A, "other": A, "gone": A, "closed": A})
    assert [(verdict.name, verdict.trouble) for verdict in verdicts] == [
        ("same", ""),
        ("other", f"the sum is {B}"),
        ("gone", "missing"),
        ("closed", "unreadable: Permission denied"),
        ("extra", "not in the list"),
        ("extra closed", "unreadable: I/O error"),
    ]


def test_equal_nodes_do_not_differ() -> None:
    assert compare_nodes({node: FileSums({"x": A, "y": B}) for node in ("1", "2", "3")}) == []
    assert compare_nodes({"1": FileSums({"x": A})}, {"x": A}) == []
    assert compare_nodes({}) == []


def test_the_node_that_differs_from_most_is_named() -> None:
    nodes = {
        "1": FileSums({"x": A, "y": A}),
        "2": FileSums({"x": B, "y": A}),
        "3": FileSums({"x": A}),
        "4": FileSums({"x": A, "y": A, "z": C}),
    }
    x, y, z = compare_nodes(nodes)
    assert (x.name, x.groups, x.expected, x.nodes) == ("x", [(A, ["1", "3", "4"]), (B, ["2"])], A, ["2"])
    assert (y.groups, y.nodes) == ([(A, ["1", "2", "4"]), ("missing", ["3"])], ["3"])
    assert (z.expected, z.nodes) == ("missing", ["4"])


def test_of_two_nodes_neither_is_right() -> None:
    (difference,) = compare_nodes({"1": FileSums({"x": A}), "2": FileSums({"x": B})})
    assert difference.expected is None and difference.nodes == ["1", "2"]


def test_a_list_decides_against_all_nodes() -> None:
    nodes = {node: FileSums({"x": B, "extra": C}) for node in ("1", "2")}
    extra, gone, x = compare_nodes(nodes, {"x": A, "gone": A})
    assert (extra.name, extra.expected, extra.nodes) == ("extra", "missing", ["1", "2"])
    assert (gone.name, gone.groups, gone.nodes) == ("gone", [("missing", ["1", "2"])], ["1", "2"])
    assert (x.name, x.groups, x.expected) == ("x", [(B, ["1", "2"])], A)


def test_what_no_node_can_read_is_a_difference() -> None:
    (difference,) = compare_nodes({node: FileSums({}, {"x": "I/O error"}) for node in ("1", "2")})
    assert difference.groups == [("unreadable: I/O error", ["1", "2"])]


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ({"a": A, "sub/b": B}, {"a": A, "sub/b": B}),
        ({"model/a": A, "model/sub/b": B}, {"a": A, "sub/b": B}),  # made one level up
        ({"model/a": A, "b": B}, {"model/a": A, "b": B}),
        ({"a": A, "/elsewhere/b": B}, {"a": A, "/elsewhere/b": B}),
    ],
)
def test_names_of_a_list(tmp_path: Path, listed: dict[str, str], expected: dict[str, str]) -> None:
    assert relative_to(tmp_path / "model", listed, is_file=False) == expected


def test_absolute_names_and_single_files(tmp_path: Path) -> None:
    root = tmp_path / "model"
    assert relative_to(root, {f"{root}/a": A, f"{root}/sub/b": B}, is_file=False) == {"a": A, "sub/b": B}
    assert relative_to(root / "a", {"a": A, "b": B}, is_file=True) == {"a": A}
    assert relative_to(root / "a", {f"{root}/a": A, "b": B}, is_file=True) == {"a": A}
    assert relative_to(root / "a", {"b": B}, is_file=True) == {}
