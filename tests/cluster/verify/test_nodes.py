"""`shoal verify --cluster` against real daemons on loopback addresses."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.cli.main import main
from shoal.cluster.verify import service as service_module
from shoal.cluster.verify.nodes import NodeHashing, find_nodes
from shoal.cluster.verify.service import HashJobs, HashRequest
from tests.cluster.verify.daemons import TOKEN, Node, daemons

ADDRESSES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
ODD = os.fsdecode(b"odd\n\xff name")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("SHOAL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SHOAL_CLUSTER_TOKEN", TOKEN)


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for address in ADDRESSES:
        model = tmp_path / address / "model"
        model.mkdir(parents=True)
        for name in ("config.json", "model-1.safetensors", "model-2.safetensors", ODD):
            (model / name).write_bytes(os.fsencode(name) * 1000)
        found[address] = tmp_path / address
    return found


def verify(head: str, *more: str) -> int:
    return main(["verify", "/model", "--cluster", "--address", head, *more])


def test_equal_nodes(roots: dict[str, Path], capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    with daemons(roots, gone=("127.0.0.9",)) as head:
        assert verify(head) == 0
        out, err = capsysbinary.readouterr()
        assert err.decode().splitlines()[-1] == "shoal verify: 4 files are the same on 3 nodes"
        lines = out.splitlines()
        assert (
            len(lines) == 4
            and lines[0] == hashlib.sha256(b"config.json" * 1000).hexdigest().encode() + b"  config.json"
        )
        sums = roots[ADDRESSES[0]] / "SUMS"
        sums.write_bytes(out)
        assert verify(head, "--check", str(sums)) == 0


def test_each_kind_of_difference_is_named(roots: dict[str, Path], capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    flipped = roots["127.0.0.2"] / "model" / "model-1.safetensors"
    data = bytearray(flipped.read_bytes())
    data[77] ^= 4
    flipped.write_bytes(data)
    (roots["127.0.0.3"] / "model" / "model-2.safetensors").unlink()
    (roots["127.0.0.3"] / "model" / "extra").write_text("x")
    with daemons(roots) as head:
        assert verify(head, "--no-cache") == 1
    out, err = capsysbinary.readouterr()
    right = hashlib.sha256(b"model-1.safetensors" * 1000).hexdigest()
    lines = err.decode().splitlines()
    first = lines.index("model-1.safetensors")
    assert lines[first + 1] == f"  {right}  127.0.0.1, 127.0.0.3  (of most nodes)"
    assert lines[first + 2] == f"  {hashlib.sha256(data).hexdigest()}  127.0.0.2"
    second = lines.index("model-2.safetensors")
    assert lines[second + 2].split() == ["missing", "127.0.0.3"]
    assert lines[lines.index("extra") + 1].split()[:3] == ["missing", "127.0.0.1,", "127.0.0.2"]
    assert lines[-1] == "shoal verify: 3 of 5 files differ; look at 127.0.0.2, 127.0.0.3 (of 3 nodes)"
    assert out.count(b"\n") == 2 and b"model-" not in out  # what all have


def test_against_a_list_all_nodes_may_be_wrong(
    roots: dict[str, Path], tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    sums = tmp_path / "SUMS"
    with daemons(roots) as head:
        verify(head)
        right = capsysbinary.readouterr().out
        sums.write_bytes(right.replace(right[:64], b"0" * 64) + b"1" * 64 + b"  gone\n")
        assert verify(head, "--check", str(sums)) == 1
    out, err = capsysbinary.readouterr()
    lines = err.decode().splitlines()
    assert out == b"" and lines[-1].startswith("shoal verify: 2 of 5 files differ; look at 127.0.0.1, 127.0.0.2, 127.0")
    assert lines[lines.index("config.json") + 2] == f"  {'0' * 64}  (the list's)"
    assert lines[lines.index("gone") + 1].split() == ["missing", "127.0.0.1,", "127.0.0.2,", "127.0.0.3"]


def test_nodes_that_lack_the_path_or_do_not_answer(
    roots: dict[str, Path], capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    (roots["127.0.0.2"] / "model").rename(roots["127.0.0.2"] / "modle")
    with daemons(roots, silent=("127.0.0.8",)) as head:
        assert verify(head) == 1
        err = capsysbinary.readouterr().err.decode()
        assert "127.0.0.2: the model directory " in err and "does not exist" in err and "modle" in err
        assert "127.0.0.8: it is a node of the cluster, and silent" in err
        assert "look at 127.0.0.2, 127.0.0.8 (of 4 nodes)" in err


def test_a_daemon_that_ends_in_between_is_named(roots: dict[str, Path]) -> None:
    with daemons(roots) as head:
        nodes = find_nodes(head, TOKEN)
        assert list(nodes.endpoints) == list(ADDRESSES) and nodes.absent == {}
        nodes.endpoints["127.0.0.7"] = nodes.endpoints["127.0.0.3"].replace("127.0.0.3", "127.0.0.7")
        hashing = NodeHashing(nodes.endpoints, TOKEN, "/model")
        found = hashing.run(lambda answers: None)
    assert set(found) == set(ADDRESSES)
    assert "nothing listens at 127.0.0.7" in hashing.errors["127.0.0.7"]
    assert all(ODD in sums.sums for sums in found.values())


def test_a_wrong_token_and_no_cluster(
    roots: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("another-token-of-this-test")
    wrong.chmod(0o600)
    with daemons(roots) as head:
        assert verify(head, "--token-file", str(wrong)) == 1
        assert "does not take the cluster token" in capsys.readouterr().err
    assert main(["verify", "/model", "--cluster"]) == 2
    assert "no node runs on this machine" in capsys.readouterr().err


def test_ctrl_c_ends_it_at_once_and_the_jobs_of_the_nodes_too(
    roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_FORGET_SECONDS", 1.0)
    with (roots["127.0.0.2"] / "model" / "huge").open("wb") as file:
        file.truncate(1 << 40)
    with daemons(roots) as head:
        command = [sys.executable, "-m", "shoal.cli", "verify", "/model", "--cluster", "--address", head]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            wait_until(lambda: hashing_threads() or process.poll() is not None)
            time.sleep(0.5)
            assert process.poll() is None
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert time.monotonic() - began < 5
        finally:
            process.kill()
            out, _ = process.communicate()
        assert out == ""
        wait_until(lambda: not hashing_threads())


def hashing_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith(("verify.hash", "sha256-"))]


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.05)


def test_a_job_that_nobody_asks_about_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_FORGET_SECONDS", 0.3)
    monkeypatch.setattr(service_module, "_ANSWER_SECONDS", 0.01)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    node, jobs = Node("127.0.0.1", "127.0.0.1:6379", []), HashJobs()
    request = HashRequest("job", str(tmp_path), num_jobs=1, use_cache=False)
    answer = jobs.run(node, request)
    assert not answer.done and answer.num_bytes in (0, 1 << 40)
    wait_until(lambda: not hashing_threads())
