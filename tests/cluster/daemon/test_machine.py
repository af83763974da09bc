"""What a machine says of itself: GPUs by a stand-in for NVIDIA's library and program, interfaces and ranks for real."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from shoal.cluster.daemon import machine
from shoal.cluster.daemon.local_ranks import LocalRanks, local_servers
from shoal.cluster.daemon.reports import GpuReport

_GIBIBYTE = 1 << 30

_RANK = """
import sys, time
from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.status import StatusBoard
board = StatusBoard.create(2)
held = StatusBoard.open(board.address)  # as an engine core holds that of its ranks: it counts once
for rank in range(2):
    record = board.record(ParallelDims(tensor_size=2, rank=rank), rank)
    record.update(generation=1, step=40 + rank, phase="forward")
print("up", flush=True)
for line in sys.stdin:
    record.update(step=int(line), phase="idle")
    print("done", flush=True)
"""


def test_what_nvidia_smi_says():
    text = "0, NVIDIA H200, 143771, 2\n1, NVIDIA GB10, [N/A], [N/A]\n\nno line of the table\n"
    assert machine.parse_smi(text) == [
        GpuReport(0, "NVIDIA H200", 143771 << 20, 2 << 20),
        GpuReport(1, "NVIDIA GB10", 0, 0),
    ]


def test_the_program_is_asked_where_the_library_is_missing(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 0, Card, 24564, 1024\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.gpus() == [GpuReport(0, "Card", 24564 << 20, 1 << 30)]
    program.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert machine.gpus() == []


class Library(SimpleNamespace):
    class NVMLError(Exception):
        pass


def test_the_library_is_asked_where_there_is_one(monkeypatch):
    library = Library(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: b"Card",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=24 * _GIBIBYTE, used=_GIBIBYTE),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert machine.gpus() == [GpuReport(0, "Card", 24 * _GIBIBYTE, _GIBIBYTE)]

    def fail() -> None:
        raise Library.NVMLError("no driver")

    library.nvmlInit = fail
    assert machine.gpus() == []


def test_interfaces_are_those_that_are_up():
    found = machine.interfaces()
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup and name != "lo"}
    assert {interface.name for interface in found} == up
    assert all(interface.mtu >= 576 for interface in found)
    assert machine.versions()["python"] == ".".join(map(str, sys.version_info[:3]))


@pytest.fixture
def ranks():
    command = [sys.executable, "-c", _RANK, "shoal.worker"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    yield process
    process.kill()
    process.communicate()


def test_ranks_of_other_processes_are_seen_until_they_end(ranks):
    local = LocalRanks()

    def seen(now: float) -> dict[int, tuple[int, str]]:
        found = [rank for rank in local.read(now) if rank.pid == ranks.pid]
        assert all(rank.world_size == 2 and 0 <= rank.seconds < 60 for rank in found) and len(found) in (0, 2)
        return {rank.rank: (rank.step, rank.phase) for rank in found}

    assert seen(0.0) == {0: (40, "forward"), 1: (41, "forward")}
    ranks.stdin.write("7\n")
    ranks.stdin.flush()
    assert ranks.stdout.readline() == "done\n"
    assert seen(0.5) == {0: (40, "forward"), 1: (7, "idle")}
    ranks.kill()
    ranks.wait()
    assert seen(1.0) == {} and seen(10.0) == {}


def test_servers_are_seen_with_their_ports():
    code = (
        "import socket, sys, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); "
    )
    code += "time.sleep(60)"
    started = time.time()
    command = [sys.executable, "-c", code, "shoal.cli", "serve", "--max-num-seqs", "4", "--model=some/model"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    port = int(process.stdout.readline())
    try:
        (found,) = [server for server in local_servers() if server.pid == process.pid]
    finally:
        process.kill()
        process.communicate()
    assert (found.kind, found.model, found.ports) == ("serve", "some/model", [port])
    assert 0 <= found.seconds <= time.time() - started + 1
