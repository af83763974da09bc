"""Every collective between real processes, against plain torch; and what happens when a rank does not play along."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shoal import network

ROOT = Path(__file__).parents[2]
SECONDS = 90


@pytest.fixture(autouse=True)
def nothing_in_shared_memory() -> Iterator[None]:
    """Whatever a test does to its ranks, no file of ours is in /dev/shm after it."""
    yield
    names = ("*shoal-group*", "*shoal-status*")
    assert not [path for name in names for path in Path("/dev/shm").glob(name)]


def run_ranks(scenario: str, size: int, tmp_path: Path, kind: str = "shm", *rest: str) -> list[tuple[int, str]]:
    """(exit status, output) of every rank."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.ranks", scenario, str(rank), str(size)]
            + [str(tmp_path / "store"), kind, *rest],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
        return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


def all_ok(results: list[tuple[int, str]]) -> None:
    for rank, (status, output) in enumerate(results):
        assert status == 0 and output.rstrip().endswith("ok"), f"rank {rank}: {output}"


@pytest.mark.parametrize(("kind", "size"), [("shm", 2), ("shm", 4), ("gloo", 2)])
def test_everything_against_plain_torch(kind: str, size: int, tmp_path: Path) -> None:
    all_ok(run_ranks("all_checks", size, tmp_path, kind))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), [("shm", 3), ("shm", 8), ("gloo", 3), ("gloo", 4)])
def test_everything_with_more_ranks(kind: str, size: int, tmp_path: Path) -> None:
    all_ok(run_ranks("all_checks", size, tmp_path, kind))


def test_groups_of_a_grid(tmp_path: Path) -> None:
    all_ok(run_ranks("grid", 4, tmp_path))


def test_meeting_over_tcp(tmp_path: Path) -> None:
    all_ok(run_ranks("master", 2, tmp_path, "shm", str(network.free_port("127.0.0.1"))))


@pytest.mark.parametrize(("kind", "size"), [("shm", 4), ("gloo", 2)])
def test_a_killed_rank_ends_the_others(kind: str, size: int, tmp_path: Path) -> None:
    results = run_ranks("killed", size, tmp_path, kind)
    assert results[1][0] == -signal.SIGKILL
    for rank, (status, output) in enumerate(results):
        if rank != 1:
            assert status == 0 and f"rank {rank} (" in output and "is in all_reduce" in output, output
            if kind == "shm":
                assert "rank 1 (" in output and "ended before it came" in output
                assert "rank 1 never entered it" in output


def test_a_rank_that_stops_coming_is_named(tmp_path: Path) -> None:
    results = run_ranks("stopped", 4, tmp_path)
    all_ok(results)
    for rank in (0, 2, 3):
        output = results[rank][1]
        assert "waited 1.5 s in all_reduce for rank 1" in output
        assert "rank 1 never entered it" in output
        assert "is in step 12, phase forward, layer 7" in output


def test_a_rank_that_never_comes_is_named_by_all(tmp_path: Path) -> None:
    results = run_ranks("late", 4, tmp_path)
    all_ok(results)
    for rank in range(3):
        output = results[rank][1]
        assert "rank 3 (on node-b, 10.0.0.4) did not come within 1 s" in output
        assert all(f"rank {other} (" in output for other in range(3))


def test_a_version_that_differs_is_refused(tmp_path: Path) -> None:
    results = run_ranks("other_version", 2, tmp_path)
    all_ok(results)
    assert all("has torch 2.13.0" in output and "has 2.11.0" in output for _, output in results)


def test_a_store_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    port = network.free_port("127.0.0.1")
    results = run_ranks("lonely", 1, tmp_path, "shm", str(port))
    all_ok(results)
    assert f"could not reach the store of rank 0 at 127.0.0.1:{port}" in results[0][1]


@pytest.mark.multigpu
@pytest.mark.parametrize("scenario", ["all_checks", "graph"])
def test_nccl(scenario: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA GPUs")
    all_ok(run_ranks(scenario, 2, tmp_path, "nccl"))


@pytest.mark.multigpu
def test_nccl_groups_of_a_grid(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 4:
        pytest.skip("needs 4 CUDA GPUs")
    all_ok(run_ranks("grid", 4, tmp_path, "nccl"))
