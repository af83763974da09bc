"""`shoal verify --cluster` on machines of their own, with the daemons that `shoal node start` starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multihost.ray_hosts import ray_cluster
from tests.namespaces import Host

_VERIFY = (sys.executable, "-m", "shoal.cli", "verify", "~/model", "--cluster")


def verify(host: Host, *more: str) -> subprocess.CompletedProcess[str]:
    process = host.popen(*_VERIFY, *more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.timeout(300)
def test_two_machines(tmp_path: Path) -> None:
    with ray_cluster(2, tmp_path, num_cpus=1) as cluster:
        first, second = cluster.hosts
        for host in cluster.hosts:  # each has a home of its own
            (host.home / "model").mkdir()
            for name in ("config.json", "model.safetensors"):
                (host.home / "model" / name).write_text(name * 1000)
        for host in cluster.hosts:
            done = verify(host)
            assert done.returncode == 0, done.stderr
            assert done.stderr.endswith("2 files are the same on 2 nodes\n") and done.stdout.count("\n") == 2
        with (second.home / "model" / "model.safetensors").open("r+b") as file:
            file.seek(500)
            file.write(b"\0")
        done = verify(first)
        assert done.returncode == 1 and "model.safetensors\n" in done.stderr
        assert f"look at {first.address}, {second.address}" in done.stderr  # of two, neither is right
        os.rename(second.home / "model", second.home / "other")
        done = verify(second)
        assert done.returncode == 1 and f"{second.address}: the model directory ~/model does not exist" in done.stderr
