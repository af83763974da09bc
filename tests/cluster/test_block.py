"""`shoal node start --block`: how it ends, as what ends it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from shoal.cluster import processes
from tests.cluster.test_node import shoal
from tests.namespaces import Host, connected_hosts, needs_namespaces

pytestmark = [needs_namespaces, pytest.mark.slow]


def start(host: Host) -> subprocess.Popen[str]:
    command = (sys.executable, "-m", "shoal.cli", "node", "start", "--head", "--num-cpus", "1", "--block")
    process = host.popen(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "The cluster is up" in process.stdout.readline()
    return process


def test_stopped_by_the_other_command():
    with connected_hosts(1) as hosts:
        (host,) = hosts.hosts
        node = start(host)
        assert shoal(host, "node", "stop") == f"The node {host.address} has ended.\n"
        output, errors = node.communicate(timeout=20)
        assert node.returncode == 0 and output.endswith("The node has ended.\n")
        assert "is up on port 6380" in errors and "started again" not in errors


@pytest.mark.timeout(400)
def test_what_ends_by_itself_is_started_again_and_told():
    with connected_hosts(1) as hosts:
        (host,) = hosts.hosts
        node = start(host)

        def until(words: str) -> None:
            for line in node.stderr:
                if words in line:
                    return
            raise AssertionError(f"it ended without saying {words!r}")

        (raylet,) = [pid for pid in host.pids() if processes.table()[pid].name == "raylet"]
        os.kill(raylet, signal.SIGKILL)
        until("Ray's part of this node has ended")
        until("Ray's part of this node is up again")
        record = json.loads(next((host.home / ".shoal" / "nodes").iterdir()).read_text())
        os.kill(record["daemon"]["pid"], signal.SIGKILL)
        until("the node's daemon has ended by itself; it is started again")
        until("is up on port 6380")
        assert re.search(r"node1 \(head\) +\S+ +1 +0 +alive +up ", shoal(host, "status"))
        os.kill(node.pid, signal.SIGTERM)
        output, _ = node.communicate(timeout=30)
        assert node.returncode == 0 and output.endswith("The node has ended.\n")
        host.wait_until_empty(0)
