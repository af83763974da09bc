"""`shoal node start --block`: how it ends, as what ends it."""

from __future__ import annotations

import os
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


def test_stopped_by_the_other_command_or_dead_by_itself():
    with connected_hosts(1) as hosts:
        (host,) = hosts.hosts
        node = start(host)
        assert shoal(host, "node", "stop") == f"The node {host.address} has ended.\n"
        output, errors = node.communicate(timeout=20)
        assert (node.returncode, errors) == (0, "") and output.endswith("The node has ended.\n")

        node = start(host)
        (raylet,) = [pid for pid in host.pids() if processes.table()[pid].name == "raylet"]
        os.kill(raylet, signal.SIGKILL)
        _, errors = node.communicate(timeout=30)
        assert node.returncode == 1 and "the node has ended by itself" in errors
        host.wait_until_empty(0)
