"""The Ray launcher on a cluster of two hosts: where ranks go, what it says of their ends, and that nothing is left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoal.config.resolve import make_engine_config
from shoal.errors import ConfigError, StartupError
from shoal.executor import ray_head
from shoal.executor.ray import RayLauncher
from shoal.executor.ray_actor import WorkerActor
from tests.executor.engines import wait_until
from tests.multihost.ray_hosts import RayCluster, ray_cluster
from tests.namespaces import Host, connected_hosts, needs_namespaces


class Program:
    """One run of tests.executor.ray_program. `workers`: what its stand-ins have printed, by rank."""

    def __init__(self, host: Host, *degrees: int, **variables: str) -> None:
        command = [sys.executable, "-m", "tests.executor.ray_program", *map(str, degrees)]
        pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        self.process = host.popen(*command, env={"OMP_NUM_THREADS": "1", **variables}, text=True, **pipes)
        self.workers: dict[int, dict[str, str]] = {}
        self.noise: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            if words := re.findall(r"(rank|pid|token|ppid) (\S+)", line):
                worker = dict(words)
                self.workers[int(worker["rank"])] = worker
            else:
                self.noise.append(line)

    def says(self) -> dict:
        line = self.process.stdout.readline()
        assert line, f"it has ended: {self.noise}"
        return json.loads(line)

    def until_workers(self, number: int) -> None:
        wait_until(lambda: len(self.workers) == number)

    def stop(self, grace_seconds: float) -> dict:
        self.process.stdin.write(f"{grace_seconds}\n")
        self.process.stdin.flush()
        return self.says()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.stdin.close()
        self.process.wait(20)
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()


@contextmanager
def program(host: Host, *degrees: int, **variables: str) -> Iterator[Program]:
    run = Program(host, *degrees, **variables)
    try:
        yield run
    finally:
        run.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[RayCluster]:
    with ray_cluster(2, tmp_path_factory.mktemp("cluster"), num_cpus=2) as cluster:
        yield cluster


@pytest.fixture
def head(cluster) -> Iterator[Host]:
    """The first host; after each test neither an actor nor a worker is left on any."""
    yield cluster.hosts[0]
    wait_until(lambda: not cluster.left(), 15)


def is_alive(pid: str) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.slow
@needs_namespaces
def test_ranks_go_to_their_nodes_and_end_in_time(cluster, head):
    with program(head, 2, 2) as run:
        said = run.says()
        assert said["address"] == head.address
        assert said["names"] == [
            f"rank {rank} (on node{1 + rank // 2}, {cluster.hosts[rank // 2].address})" for rank in range(4)
        ]
        assert said["token"] == (head.home / ".shoal" / "cluster-token").read_text().strip()
        run.until_workers(4)
        assert {worker["token"] for worker in run.workers.values()} == {said["token"]}
        for rank, worker in run.workers.items():
            assert int(worker["pid"]) in cluster.hosts[rank // 2].pids()
        assert not run.noise
        # They wait for the end of their standard input, so the whole grace goes by.
        assert run.stop(0.5)["stopped"] < 10
        assert not [worker for worker in run.workers.values() if is_alive(worker["pid"])]
    # What it held is free again: the next gets all of it.
    with program(head, 4, 1) as run:
        assert len(run.says()["names"]) == 4
        run.stop(0.0)


@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize("frozen", [False, True])
def test_a_launcher_that_is_killed_leaves_nothing(cluster, head, frozen):
    with program(head, 2, 2) as run:
        said = run.says()
        run.until_workers(4)
        if frozen:  # it cannot see that its parent is gone
            os.kill(int(run.workers[3]["pid"]), signal.SIGSTOP)
        os.kill(said["pid"], signal.SIGKILL)
        wait_until(lambda: not [each for each in run.workers.values() if is_alive(each["pid"])], 15)


@pytest.mark.slow
@needs_namespaces
def test_ends_are_told_once_with_their_reason(head):
    with program(head, 2, 2) as run:
        run.says()
        run.until_workers(4)
        os.kill(int(run.workers[2]["pid"]), signal.SIGKILL)
        said = run.says()
        assert said["rank"] == 2 and said["how"].startswith("was killed by signal 9")
        os.kill(int(run.workers[1]["ppid"]), signal.SIGKILL)  # the actor
        said = run.says()
        assert said["rank"] == 1 and "died with its Ray actor" in said["how"]
        assert said["how"].endswith("End of file"), "what is known, and not all that may have been"
        wait_until(lambda: not is_alive(run.workers[1]["pid"]))
        assert "stopped" in run.stop(0.0), "ends of the others, which it brings about itself, are not told"


@pytest.mark.slow
@needs_namespaces
def test_a_head_that_is_gone_ends_the_engine_before_ray_does(tmp_path):
    with ray_cluster(2, tmp_path, num_cpus=1) as cluster:
        head = cluster.hosts[0]
        with program(head, 2, 1) as run:
            run.says()
            run.until_workers(2)
            for name in ("shoal.cluster.daemon", "gcs_server"):  # the daemon would start Ray's part again
                (pid,) = cluster.processes(head, name)
                os.kill(pid, signal.SIGKILL)
            said = [run.says(), run.says()]
            assert {each["rank"] for each in said} == {0, 1}
            seen = f"cannot reach the head at {head.address}:6379: nothing listens there"
            assert all(f"the head of its Ray cluster is gone: {seen}" in each["how"] for each in said)
            assert run.stop(0.0)["stopped"] < 10, "nothing waits for a head that does not answer"
            assert not [worker for worker in run.workers.values() if is_alive(worker["pid"])]
            wait_until(lambda: not cluster.left(), 5)


@pytest.mark.slow
@needs_namespaces
def test_a_frozen_worker_is_ended_too(head):
    with program(head, 1, 1) as run:
        run.says()
        run.until_workers(1)
        os.kill(int(run.workers[0]["pid"]), signal.SIGSTOP)
        assert run.stop(0.2)["stopped"] < 10
        assert not is_alive(run.workers[0]["pid"])


@pytest.mark.slow
@needs_namespaces
def test_a_cluster_without_room_says_what_there_is(cluster, head):
    node1, node2 = (host.address for host in cluster.hosts)
    with program(head, 8, 1) as run:
        said = run.says()
        assert said["seconds"] < 10
        assert (
            "no room for 8 ranks (tensor_parallel_size 8 × pipeline_parallel_size 1), each of which takes one CPU: "
            f"node1 ({node1}) has 2 CPUs, all free; node2 ({node2}) has 2 CPUs, all free."
        ) in said["error"]
    with program(head, 3, 1) as first:
        first.says()
        with program(head, 2, 1) as run:
            said = run.says()
            assert said["seconds"] < 20 and "1 of them free" in said["error"]
        first.stop(0.0)


@pytest.mark.slow
@needs_namespaces
def test_which_cluster(cluster, head, tmp_path):
    elsewhere = {"HOME": str(tmp_path)}  # no node was started as far as this user can see
    with program(head, 1, 1, RAY_ADDRESS=f"{head.address}:6379", **elsewhere) as run:
        assert "refuses the cluster token" in run.says()["error"]
    token = (head.home / ".shoal" / "cluster-token").read_text().strip()
    given = {"SHOAL_CLUSTER_TOKEN": token, **elsewhere}
    with program(cluster.hosts[1], 1, 1, RAY_ADDRESS=f"{head.address}:6379", **given) as run:
        # The second host's own address, and its own node for the first rank.
        said = run.says()
        assert said["address"] == cluster.hosts[1].address and "node2" in said["names"][0]
        run.stop(0.0)
    with program(head, 1, 1, RAY_ADDRESS=f"{head.address}:6380", **given) as run:
        assert "nothing listens there" in run.says()["error"]


@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize(
    "authentication",
    [{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-key-of-theirs-alone"}, {"RAY_AUTH_MODE": "disabled"}],
)
def test_a_cluster_that_somebody_else_started(authentication):
    with connected_hosts(1) as hosts:
        (host,) = hosts.hosts
        start = ["--head", "--num-cpus", "1", "--include-dashboard", "false", "--disable-usage-stats"]
        start += [
            "--node-ip-address",
            host.address,
            "--object-store-memory",
            str(128 << 20),
            "--temp-dir",
            str(host.home),
        ]
        host.run(sys.executable, "-m", "ray.scripts.scripts", "start", *start, env=authentication)
        # A token of ours, for another cluster, does not get in the way.
        mine = {"RAY_ADDRESS": f"{host.address}:6379", "SHOAL_CLUSTER_TOKEN": "t" * 32}
        with program(host, 1, 1, **authentication, **mine) as run:
            said = run.says()
            run.until_workers(1)
            assert run.workers[0]["token"] == said["token"] != "t" * 32
            assert len(said["token"]) == 64
            run.stop(0.0)


def launcher(**options):
    return RayLauncher(
        make_engine_config(model="shoal-tiny", device="cpu", distributed_executor_backend="ray", **options)
    )


@pytest.fixture
def nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_gateway_for_clients_is_no_head(monkeypatch, nothing_is_known):
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(ConfigError, match="RAY_ADDRESS=ray://head:10001 is a gateway.*RAY_ADDRESS=HEAD:PORT"):
        launcher().listen_address()


def test_without_a_cluster_the_commands_that_make_one_are_named(monkeypatch, nothing_is_known):
    monkeypatch.setattr("shoal.executor.ray.clusters_here", set)
    with pytest.raises(StartupError, match="shoal node start --head.*shoal node start --address HEAD:PORT"):
        launcher().listen_address()
    monkeypatch.setattr("shoal.executor.ray.clusters_here", lambda: {"10.0.0.1:6379", "10.0.0.2:6379"})
    with pytest.raises(StartupError, match="several Ray clusters run here: 10.0.0.1:6379, 10.0.0.2:6379"):
        launcher().listen_address()


def test_a_head_that_has_gone(monkeypatch, nothing_is_known):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(StartupError, match="cannot reach the head at 127.0.0.1:1: nothing listens there"):
        launcher().listen_address()


def test_other_versions_are_named():
    answer = ray_head.Answer(ray_version="2.99.0", python_version="3.12.1")
    with pytest.raises(StartupError, match="the cluster of head:6379 has Ray 2.99.0; every node must have the same"):
        ray_head.check_versions("head:6379", answer)


def test_a_ray_that_has_changed_inside_is_named():
    found = r"Ray [\d.]+ is installed here, and lacks .*tested .*what_it_once_had.*pip install 'ray==2"
    with pytest.raises(StartupError, match=found), ray_head.private_names():
        from ray._private.services import what_it_once_had  # noqa: F401


def test_an_actor_that_cannot_start_its_worker_keeps_nothing_open(monkeypatch):
    def fail(*arguments):
        raise OSError("no more processes")

    monkeypatch.setattr("shoal.executor.ray_actor.WorkerProcess", fail)
    actor = WorkerActor()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="no more processes"):
        actor.start(["-m", "shoal.worker"], "t" * 32, {})
    assert os.listdir("/proc/self/fd") == before


def test_a_rank_sees_all_devices_of_its_engine_on_its_node(nothing_is_known):
    from shoal.executor.ray_placement import NodeRoom

    here, there = (NodeRoom(name, f"10.0.0.{name}", f"node{name}", 4, 4) for name in "12")
    ranks = launcher(tensor_parallel_size=4)
    ranks._places = [here, here, there, there]
    places = [{"gpus": gpus} for gpus in (["10"], ["9"], ["GPU-b"], ["GPU-a"])]
    assert ranks._devices(places) == ["9,10", "9,10", "GPU-a,GPU-b", "GPU-a,GPU-b"]
    assert [ranks.device_index(rank, rank % 2) for rank in range(4)] == [0, 1, 0, 1]
