"""`shoal node` on hosts of their own: a cluster from two commands, what goes wrong, and what is left at the end."""

from __future__ import annotations

import os
import re
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.network.token import create_token
from tests.namespaces import Host, connected_hosts, needs_namespaces

pytestmark = needs_namespaces


def shoal(host: Host, *arguments: str, fails: bool = False, **variables: str) -> str:
    """What `shoal …` prints on a host; with `fails`, its error."""
    command = (sys.executable, "-m", "shoal.cli", *arguments)
    if not fails:
        return host.run(*command, env=variables)
    with pytest.raises(AssertionError) as failure:
        host.run(*command, env=variables)
    return str(failure.value)


@pytest.fixture(autouse=True)
def ray_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where nodes of this test put their directories. Short: Ray's sockets lie deep in them, with 107 bytes a path."""
    with tempfile.TemporaryDirectory(prefix="n-", dir="/tmp") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        yield Path(directory)


def ray_directories(ray_home: Path) -> list[Path]:
    return list(ray_home.glob("shoal-ray-*"))


def test_a_cluster_from_two_commands(ray_home):
    with connected_hosts(2) as hosts:
        head, other = hosts.hosts
        printed = shoal(head, "node", "start", "--head", "--num-cpus", "2", "--resources", '{"disk": 1}')
        assert len(ray_directories(ray_home)) == 1
        token_file = head.home / ".shoal" / "cluster-token"
        assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
        token = token_file.read_text().strip()
        # The command that is printed is the one that works.
        assert f"SHOAL_CLUSTER_TOKEN={token} shoal node start --address {head.address}:6379\n" in printed
        assert "runs on this machine already" in shoal(head, "node", "start", "--head", fails=True)

        wrong = shoal(other, "node", "start", "--address", head.address, fails=True, SHOAL_CLUSTER_TOKEN="x" * 32)
        assert f"the head at {head.address}:6379 refuses the cluster token" in wrong
        assert other.pids() == []
        joined = shoal(other, "node", "start", "--address", f"{head.address}:6379", "--num-cpus", "3",
                       SHOAL_CLUSTER_TOKEN=token)  # fmt: skip
        assert f"({other.address}) is a node of the cluster {head.address}:6379" in joined

        # No variable any more: the token is kept where later commands look.
        for host in (head, other):
            assert stat.S_IMODE((host.home / ".shoal").stat().st_mode) == 0o700
            table = shoal(host, "status")
            assert re.search(rf"node1 \(head\) +{head.address} +2 +0 +alive +up +", table), table
            assert re.search(rf"node2 +{other.address} +3 +0 +alive +up +", table), table

        assert shoal(other, "node", "stop") == f"The node {other.address} has ended.\n"
        other.wait_until_empty(0)
        assert shoal(other, "node", "stop") == "No node runs on this machine.\n"
        assert re.search(rf"node2 +{other.address} +– +– +left +down +", shoal(head, "status"))
        shoal(head, "node", "stop")
        head.wait_until_empty(0)
        for host in (head, other):
            assert [path.name for path in (host.home / ".shoal").rglob("*") if path.is_file()] == ["cluster-token"]
    assert not ray_directories(ray_home)


def test_what_keeps_a_node_from_starting(tmp_path):
    with connected_hosts(2) as hosts:
        head, other = hosts.hosts
        missing = shoal(other, "node", "start", "--address", head.address, fails=True)
        assert "SHOAL_CLUSTER_TOKEN" in missing and "--token-file" in missing and "cluster-token" in missing
        create_token(tmp_path / "token")
        token = ("--token-file", str(tmp_path / "token"))
        join = ("node", "start", *token, "--address")
        assert "nothing listens there" in shoal(other, *join, head.address, fails=True)
        assert "resolves to 127.0.1.1 on this machine" in shoal(other, *join, "node2", fails=True)
        assert "10.255.255.1" in shoal(other, *join, "10.255.255.1", fails=True)
        elsewhere = shoal(other, *join, head.address, "--node-ip", "10.255.255.1", fails=True)
        assert "no interface of this machine has the address 10.255.255.1; there are: lo 127.0.0.1, eth0" in elsewhere
        assert "'eth0' is no IP address" in shoal(other, *join, head.address, "--node-ip", "eth0", fails=True)
        assert "--resources must be JSON" in shoal(head, "node", "start", "--head", "--resources", "disk", fails=True)
        assert "say which" in shoal(head, "node", "start", fails=True)
        assert "--dashboard goes with --head" in shoal(other, *join, head.address, "--dashboard", fails=True)
        collides = shoal(head, "node", "start", "--head", "--port", "10000", fails=True)
        assert "10002 to 10999 are Ray's workers': choose another --port" in collides
        assert "no node runs on this machine" in shoal(other, "status", fails=True)
        nobody = shoal(other, "status", "--address", head.address, *token, fails=True)
        assert f"nothing listens at {head.address}:6380: no node daemon runs there" in nobody
        # A listener that is no head: it takes the connection and says nothing.
        listen = "import socket, time; s = socket.create_server(('', 6379)); print('up', flush=True); time.sleep(60)"
        listener = head.popen(sys.executable, "-c", listen, stdout=-1, text=True)
        assert listener.stdout.readline() == "up\n"
        taken = shoal(head, "node", "start", "--head", fails=True)
        assert f"port 6379 on {head.address} is taken by python" in taken and "--port" in taken
        listener.kill()
        listener.wait()
        listener.stdout.close()
        assert head.pids() == other.pids() == []


@pytest.mark.slow
def test_a_listener_that_is_no_head_does_not_hold_the_command_up(tmp_path):
    create_token(tmp_path / "token")
    with connected_hosts(1) as hosts:
        (host,) = hosts.hosts
        listen = "import socket, time; s = socket.create_server(('', 6379)); print('up', flush=True); time.sleep(100)"
        listener = host.popen(sys.executable, "-c", listen, stdout=-1, text=True)
        assert listener.stdout.readline() == "up\n"
        said = shoal(
            host, "node", "start", "--token-file", str(tmp_path / "token"), "--address", host.address, fails=True
        )
        assert "did not answer within 20 s" in said
        listener.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_node_in_the_foreground_ends_with_its_command(number):
    with connected_hosts(1) as hosts:
        (host,) = hosts.hosts
        command = (sys.executable, "-m", "shoal.cli", "node", "start", "--head", "--block", "--num-cpus", "1")
        process = host.popen(*command, stdout=-1, stderr=-2, text=True)
        assert "is its head" in process.stdout.readline()
        os.kill(process.pid, number)
        assert process.stdout.read().endswith("The node has ended.\n")
        process.stdout.close()
        assert process.wait(20) == 0
        host.wait_until_empty(0)


@pytest.mark.slow
def test_an_interrupted_start_leaves_nothing(ray_home):
    with connected_hosts(1) as hosts:
        (host,) = hosts.hosts
        process = host.popen(
            sys.executable, "-m", "shoal.cli", "node", "start", "--head", stdout=-1, stderr=-2, text=True
        )
        while not any(Path(f"/proc/{pid}/comm").read_text() == "gcs_server\n" for pid in host.pids()):
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 130
        host.wait_until_empty(0)
        assert not ray_directories(ray_home)
        assert not list((host.home / ".shoal" / "nodes").iterdir())
