"""A cluster of hosts: what `shoal status` says on each, what keeps a node out, a cut, a head that dies, and the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster import processes
from shoal.cluster.daemon.client import ask
from shoal.cluster.daemon.node_services import PING
from shoal.cluster.daemon.wire import Nothing
from shoal.cluster.ports import NodePorts
from shoal.errors import NodeError
from tests.multihost import firewall
from tests.multihost.ray_hosts import ray_cluster
from tests.multihost.served import PROMPTS, client_on, complete
from tests.namespaces import Host, Network, connected_hosts, needs_namespaces

pytestmark = [needs_namespaces, pytest.mark.timeout(400)]

_SHOAL = (sys.executable, "-m", "shoal.cli")
_ALL = [("tcp", 1, 32767), ("udp", 1, 32767)]
# What a machine is allowed on which much else runs; alone it takes a third of it or less.
_PATIENCE = 90.0


class Cluster:
    """Two nodes on the first two hosts; the third is a machine beside them."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.head, self.node, self.other = network.hosts
        self.directory = Path(tempfile.gettempdir())

    @property
    def token(self) -> str:
        return (self.head.home / ".shoal" / "cluster-token").read_text().strip()

    def shoal(self, host: Host, *arguments: str) -> str:
        return host.run(*_SHOAL, *arguments, env={"SHOAL_CLUSTER_TOKEN": self.token}, timeout=120)

    def join(self, host: Host, **options: Any) -> str:
        return self.shoal(host, "node", "start", "--address", self.head.address, "--num-cpus", "3")

    def refused(self, host: Host) -> tuple[str, float]:
        """What keeps `host` from joining, and after how many seconds that is said."""
        began = time.monotonic()
        with pytest.raises(AssertionError) as failure:
            self.join(host)
        assert host.pids() == []
        return str(failure.value), time.monotonic() - began

    def status(self, host: Host, *arguments: str) -> dict[str, Any]:
        return dict(json.loads(self.shoal(host, "status", "--json", *arguments)))

    def nodes(self, host: Host, *arguments: str) -> dict[str, dict[str, Any]]:
        return {node["hostname"]: node for node in self.status(host, *arguments)["nodes"]}

    def wait_until(self, condition: Callable[[], bool], seconds: float = _PATIENCE) -> float:
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, f"it did not happen:\n{self.logs()}"
            time.sleep(0.1)
        return time.monotonic() - began

    def is_whole(self) -> bool:
        nodes = self.nodes(self.head)
        return all(
            name in nodes
            and nodes[name]["is_ray_alive"]
            and nodes[name]["state"] in ("alive", "flapping")
            and nodes[name]["trouble"] == ""
            for name in ("node1", "node2")
        )

    def pids(self, host: Host, name: str) -> list[int]:
        return [pid for pid in host.pids() if (entry := processes.table().get(pid)) and entry.name == name]

    def logs(self) -> str:
        return "\n".join(f"--- {log}\n{log.read_text()}" for log in self.directory.glob("shoal-ray-*/daemon.log"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    before = set(os.listdir("/dev/shm"))
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # Short: Ray's sockets lie deep in it, with 107 bytes a path.
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="n-", dir="/tmp"))
        patch.setenv("TMPDIR", directory)
        patch.setattr(tempfile, "tempdir", None)
        patch.setenv("OMP_NUM_THREADS", "1")
        cluster = Cluster(stack.enter_context(connected_hosts(3)))
        began = time.monotonic()
        cluster.head.run(*_SHOAL, "node", "start", "--head", "--num-cpus", "2", timeout=120)
        cluster.join(cluster.node)
        print(f"up after {time.monotonic() - began:.1f} s at a load of {os.getloadavg()[0]:.1f}")
        yield cluster
        for host in (cluster.node, cluster.head):
            assert "has ended" in cluster.shoal(host, "node", "stop")
            host.wait_until_empty(0)
            left = [path.name for path in (host.home / ".shoal").rglob("*") if path.is_file()]
            assert left == ["cluster-token"]
        assert not list(Path(directory).glob("shoal-ray-*"))
        assert not [name for name in set(os.listdir("/dev/shm")) - before if "plasma" in name or "ray" in name]


def test_status_is_right_from_every_machine(cluster):
    head = ("--address", f"{cluster.head.address}:6379")
    for host, arguments in ((cluster.head, ()), (cluster.node, ()), (cluster.other, head)):
        cluster.wait_until(lambda host=host, arguments=arguments: len(cluster.nodes(host, *arguments)) == 2, 10)
        status = cluster.status(host, *arguments)
        assert status["notes"] == []
        assert status["seen_from"] == (cluster.head if host is cluster.other else host).address
        first, second = status["nodes"]
        assert (first["hostname"], first["is_head"]) == ("node1", True)
        assert (second["hostname"], second["is_head"]) == ("node2", False)
        for node, machine, num_cpus in ((first, cluster.head, 2), (second, cluster.node, 3)):
            assert (node["address"], node["state"], node["is_ray_alive"]) == (machine.address, "alive", True)
            assert node["seconds_since_heartbeat"] < 3 and node["trouble"] == ""
            assert node["total"]["CPU"] == node["free"]["CPU"] == num_cpus
            report = node["report"]
            assert report["interface"] == "eth0"
            (interface,) = report["interfaces"]
            assert interface["name"] == "eth0" and machine.address in interface["addresses"]
            assert interface["mtu"] == 1500 and interface["speed"] > 0
            assert report["memory_total"] > report["memory_available"] > 0
            assert {"shoal", "python", "ray"} <= set(report["versions"]) and report["gpus"] == []
            assert report["ranks"] == [] and report["servers"] == []
    lines = cluster.shoal(cluster.node, "status")
    assert "node1 (head)" in lines and "eth0: " in lines and "MTU 1500, used by the cluster" in lines


def test_another_token_is_refused_by_the_daemon_too(cluster):
    endpoint = f"{cluster.head.address}:{NodePorts().daemon}"
    with cluster.other.entered():
        assert ask(endpoint, cluster.token, PING, Nothing()).address == cluster.head.address
        with pytest.raises(NodeError, match="does not take the cluster token") as caught:
            ask(endpoint, "another-token-than-that", PING, Nothing())
    assert caught.value.reason == "token"


def test_only_the_port_of_the_head_is_open(cluster):
    firewall.close(cluster.head, _ALL, source=cluster.other, but_for=[("tcp", 6379, 6379)])
    try:
        said, seconds = cluster.refused(cluster.other)
    finally:
        firewall.open_again(cluster.head)
    assert seconds < 20
    for port in (
        "6380/tcp (dropped",
        "6380/udp (dropped",
        "6381/tcp (dropped",
        "6382/tcp (dropped",
        "10002-10999/tcp (",
    ):
        assert port in said, said
    assert "a firewall on the way swallows the packets" in said and "6379/tcp" not in said


def test_the_way_back_is_tried_too(cluster):
    firewall.close(cluster.other, [("udp", 6380, 6380), ("tcp", 10400, 20000)], source=cluster.head)
    try:
        said, seconds = cluster.refused(cluster.other)
    finally:
        firewall.open_again(cluster.other)
    assert seconds < 20
    assert f"of this machine ({cluster.other.address}), from the head: " in said, said
    assert "6380/udp (dropped" in said and "10500/tcp (dropped" in said and "10999/tcp (dropped" in said, said
    assert "10002/tcp" not in said and "6381/tcp" not in said


def test_a_taken_port_is_named_before_anything_starts(cluster):
    listen = (
        "import socket, time; s = socket.create_server(('127.0.0.1', 6381)); print('up', flush=True); time.sleep(99)"
    )
    listener = cluster.other.popen(sys.executable, "-c", listen, stdout=-1, text=True)
    assert listener.stdout.readline() == "up\n"
    with pytest.raises(AssertionError) as failure:
        cluster.join(cluster.other)
    listener.kill()
    listener.wait()
    listener.stdout.close()
    said = str(failure.value)
    assert f"port 6381 on 0.0.0.0 is taken by python (pid {listener.pid})" in said and "Ray's node manager" in said


def test_a_node_that_is_cut_off_is_known_and_comes_back(cluster):
    """Until `status` says so: 3 s of silence and the command itself."""
    cluster.network.cut(cluster.node)
    cut_at = time.monotonic()
    try:
        cluster.wait_until(lambda: cluster.nodes(cluster.head)["node2"]["state"] == "lost", 30)
        known_after = time.monotonic() - cut_at
        own = cluster.status(cluster.node)
        assert f"cut off from the head {cluster.head.address}" in own["notes"][0]
        assert {node["hostname"]: node["state"] for node in own["nodes"]} == {"node1": "lost", "node2": "alive"}
        cluster.wait_until(lambda: cluster.nodes(cluster.head)["node2"]["is_ray_alive"] is False, 30)
    finally:
        cluster.network.heal(cluster.node)
    back_after = cluster.wait_until(cluster.is_whole)
    print(f"known after {known_after:.1f} s, back after {back_after:.1f} s, load {os.getloadavg()[0]:.1f}")
    node = cluster.nodes(cluster.head)["node2"]
    assert node["state"] == "flapping" and node["num_flaps"] == 1 and node["num_restarts"] == 0
    assert node["address"] == cluster.node.address and node["total"]["CPU"] == 3


def test_a_daemon_that_dies_is_seen(cluster):
    record = json.loads(next((cluster.node.home / ".shoal" / "nodes").iterdir()).read_text())
    os.kill(record["daemon"]["pid"], signal.SIGKILL)
    cluster.wait_until(lambda: cluster.nodes(cluster.head)["node2"]["state"] == "lost", 30)
    node = cluster.nodes(cluster.head)["node2"]
    assert node["is_ray_alive"]  # the machine is there, and works
    status = cluster.status(cluster.node)
    assert "this machine's own daemon does not answer" in status["notes"][0]
    assert status["seen_from"] == cluster.head.address
    with pytest.raises(AssertionError, match="its daemon has ended"):
        cluster.join(cluster.node)
    cluster.shoal(cluster.node, "node", "stop")
    cluster.node.wait_until_empty(0)
    cluster.join(cluster.node)
    cluster.wait_until(cluster.is_whole, 30)
    assert cluster.nodes(cluster.head)["node2"]["num_restarts"] == 1


@pytest.mark.slow
def test_a_head_that_dies_comes_back_and_its_nodes_with_it(cluster):
    (server,) = cluster.pids(cluster.head, "gcs_server")
    os.kill(server, signal.SIGKILL)
    cluster.wait_until(lambda: bool(cluster.pids(cluster.head, "gcs_server")))
    seconds = cluster.wait_until(cluster.is_whole, 2 * _PATIENCE)
    print(f"whole again after {seconds:.1f} s, load {os.getloadavg()[0]:.1f}")
    nodes = cluster.nodes(cluster.head)
    assert nodes["node1"]["total"]["CPU"] == 2 and nodes["node2"]["total"]["CPU"] == 3


@pytest.mark.slow
def test_a_head_that_is_started_anew_gets_its_nodes_back(cluster):
    cluster.shoal(cluster.head, "node", "stop")
    cluster.head.wait_until_empty(0)
    nodes = {node["hostname"]: node["state"] for node in cluster.status(cluster.node)["nodes"]}
    assert nodes["node1"] in ("left", "lost")
    cluster.shoal(cluster.head, "node", "start", "--head", "--num-cpus", "2")
    seconds = cluster.wait_until(cluster.is_whole, 2 * _PATIENCE)
    print(f"whole again after {seconds:.1f} s, load {os.getloadavg()[0]:.1f}")
    assert cluster.nodes(cluster.node)["node1"]["num_restarts"] >= 1


@pytest.mark.slow
def test_ranks_of_an_engine_are_seen_from_every_node(tmp_path):
    """Two ranks on two machines: each tells of its own, and beats tell the other's progress."""
    with ray_cluster(2, tmp_path, num_cpus=1) as nodes:
        server = nodes.serve("--tensor-parallel-size", "2", "--max-model-len", "512", "--num-gpu-blocks-override", "64")
        server.until("is served at", 150)
        with client_on(nodes.hosts[0]) as client:
            complete(client, PROMPTS[0], 8)
        time.sleep(3.0)  # a look for new ranks, and a beat
        for host in nodes.hosts:
            status = json.loads(host.run(*_SHOAL, "status", "--json"))
            by_name = {node["hostname"]: node for node in status["nodes"]}
            steps = []
            for name, number in (("node1", 0), ("node2", 1)):
                (rank,) = by_name[name]["report"]["ranks"]
                assert (rank["rank"], rank["world_size"]) == (number, 2) and rank["seconds"] < 30
                steps.append(rank["step"])
                assert by_name[name]["free"].get("CPU", 0) == 0 and by_name[name]["total"]["CPU"] == 1
                if (peer := by_name[name]["last_known"]) is not None:
                    assert [each["pid"] for each in peer["ranks"]] == [rank["pid"]]
            assert min(steps) >= 7  # the eighth, from 0
            (api,) = by_name["node1"]["report"]["servers"]
            assert (api["kind"], api["ports"]) == ("serve", [8000]) and by_name["node2"]["report"]["servers"] == []
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code(30) == 0
