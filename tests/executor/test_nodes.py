"""Node 0's launcher and the agents of the other nodes, over the loopback, with programs that only wait as workers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import signal
import sys
import threading
import time

import psutil
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from shoal import network
from shoal.config.parallel import ParallelConfig
from shoal.config.resolve import make_engine_config
from shoal.errors import ConfigError, EngineDeadError, ShoalError, StartupError
from shoal.executor.launcher import WorkerLink
from shoal.executor.multiprocess import LocalLauncher
from shoal.executor.node_agent import NodeAgent
from shoal.executor.node_layout import index_on_node, node_of, ranks_on
from shoal.executor.nodes import NodesLauncher

TOKEN = "the-token-of-this-test"
WAITING = [sys.executable, "-c", "import sys; sys.stdin.buffer.read()"]


class WaitingWorkers(LocalLauncher):
    """Each worker waits for the end of its standard input. links: what each rank was told."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.links = {}

    def command(self, link, rank):
        self.links[rank] = link
        return WAITING

    def pid(self, rank):
        return self._processes[rank].pid

    def num_started(self):
        return sum("pid" in self.describe(rank) for rank in self.links)


class Launcher(NodesLauncher):
    def make_local(self, config, ranks):
        self.workers = WaitingWorkers(config, ranks)
        return self.workers


class Agent(NodeAgent):
    def make_workers(self, config, ranks):
        self.workers = WaitingWorkers(config, ranks)
        return self.workers


class Cluster:
    """Node 0 in the test's own thread, agents in threads. `exits`: what the executor would be told."""

    def __init__(self, **options):
        defaults = {"device": "cpu", "tensor_parallel_size": 2, "pipeline_parallel_size": 2, "nnodes": 2}
        addresses = {"master_addr": "127.0.0.1", "master_port": network.free_port(), "startup_timeout": 30.0}
        self.options = {**defaults, **addresses, **options}
        self.exits = queue.SimpleQueue()
        self.launcher = Launcher(self.config())
        self.agents, self._threads, self._errors = [], [], {}

    def config(self, **options):
        return make_engine_config(**{**self.options, **options})

    def start(self):
        token = self.launcher.token()
        self.launcher.start(
            WorkerLink(endpoint="tcp://127.0.0.1:9", generation=3, token=token), lambda *exit: self.exits.put(exit)
        )

    def add(self, node_rank=1, config=None):
        agent = Agent(config or self.config(node_rank=node_rank))

        def run():
            try:
                agent.run()
            except ShoalError as error:
                self._errors[agent] = error

        thread = threading.Thread(target=run)
        self.agents.append(agent)
        self._threads.append(thread)
        thread.start()
        return agent

    def end_of(self, agent):
        """What `run` raised, or None."""
        thread = self._threads[self.agents.index(agent)]
        thread.join(20)
        assert not thread.is_alive()
        return self._errors.get(agent)

    def wait_for_workers(self, agent, num_ranks=2):
        wait_until(lambda: agent.workers.num_started() == num_ranks)

    def close(self):
        self.launcher.stop(0.0)
        for agent in self.agents:
            agent.leave("the test is over")
            self.end_of(agent)


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("SHOAL_CLUSTER_TOKEN", TOKEN)


@pytest.fixture
def cluster():
    with contextlib.closing(Cluster()) as cluster:
        yield cluster


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children():
    return {child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}


@pytest.mark.parametrize("agent_first", [True, False])
def test_each_node_starts_its_own_ranks_and_all_end_in_order(cluster, agent_first):
    before = children()
    if agent_first:
        agent = cluster.add()
        time.sleep(0.3)
        cluster.start()
    else:
        cluster.start()
        agent = cluster.add()
    cluster.wait_for_workers(agent)
    assert sorted(cluster.launcher.workers.links) == [0, 1]
    assert sorted(agent.workers.links) == [2, 3]
    link = agent.workers.links[2]
    assert (link.endpoint, link.generation, link.token) == ("tcp://127.0.0.1:9", 3, TOKEN)
    assert link.model_path == cluster.config().model.path  # the node's own: the core's may lie elsewhere
    assert cluster.launcher.describe(1).startswith("rank 1 (on this host, pid")
    assert cluster.launcher.describe(3).startswith("rank 3 (on node 1, ")
    assert len(children() - before) == 4
    cluster.launcher.stop(0.0)
    assert cluster.end_of(agent) is None
    assert children() == before and cluster.exits.empty()


def test_an_agent_learns_why_the_engine_failed(cluster):
    cluster.start()
    agent = cluster.add()
    cluster.wait_for_workers(agent)
    cluster.launcher.tell("rank 1 ran out of memory")
    cluster.launcher.tell("the others followed")
    cluster.launcher.stop(0.0)
    error = cluster.end_of(agent)
    assert isinstance(error, EngineDeadError) and str(error) == "the engine ended: rank 1 ran out of memory"


def test_the_death_of_a_worker_of_another_node_is_told(cluster):
    cluster.start()
    agent = cluster.add()
    cluster.wait_for_workers(agent)
    os.kill(agent.workers.pid(3), signal.SIGKILL)
    rank, how = cluster.exits.get(timeout=20)
    assert rank == 3 and "was killed by signal 9" in how


def test_a_node_that_leaves_ends_its_ranks_and_is_named(cluster):
    cluster.start()
    agent = cluster.add()
    cluster.wait_for_workers(agent)
    agent.leave("it was ended there by SIGTERM")
    assert cluster.end_of(agent) is None
    exits = [cluster.exits.get(timeout=20) for _ in range(2)]
    assert [rank for rank, _ in exits] == [2, 3]
    assert all("because node 1 left" in how and how.endswith("it was ended there by SIGTERM") for _, how in exits)
    assert not any(psutil.pid_exists(agent.workers.pid(rank)) for rank in (2, 3))


def test_an_agent_whose_connection_is_closed_is_gone(cluster):
    """As after kill -9: no word, but the kernel closes the connection."""
    cluster.start()
    agent = cluster.add()
    cluster.wait_for_workers(agent)
    agent._socket.disconnect(agent._socket.last_endpoint)
    rank, how = cluster.exits.get(timeout=5)
    assert rank == 2 and "is gone with node 1: " in how


def test_a_node_that_is_started_otherwise_is_refused_and_the_right_one_let_in(cluster):
    cluster.start()
    wrong = cluster.add(config=cluster.config(node_rank=1, tensor_parallel_size=1, max_model_len=64))
    error = cluster.end_of(wrong)
    assert isinstance(error, StartupError)
    for part in ("refused", "tensor_parallel_size (1 there, 2 on node 0)", "max_model_len (64 there, 8192 on node 0)"):
        assert part in str(error)
    assert not wrong.workers.links
    assert "which has not come" in cluster.launcher.describe(2) and "tensor_parallel" in cluster.launcher.describe(2)
    cluster.wait_for_workers(cluster.add())
    assert cluster.exits.empty()


def test_a_model_that_differs_is_named(cluster):
    cluster.start()
    config = cluster.config(node_rank=1)
    raw = {**config.model.raw, "hidden_size": 320, "_name_or_path": "elsewhere"}
    agent = cluster.add(config=dataclasses.replace(config, model=dataclasses.replace(config.model, raw=raw)))
    error = str(cluster.end_of(agent))
    assert "differs from node 0 in the model's hidden_size (320 there, 256 on node 0)" in error
    assert "elsewhere" not in error


def test_a_version_that_differs_is_named(cluster, monkeypatch):
    cluster.start()
    monkeypatch.setattr("shoal.executor.node_layout.__version__", "0.0.1")
    assert "version of shoal (0.0.1 there, " in str(cluster.end_of(cluster.add()))


def test_two_nodes_of_one_rank(cluster):
    cluster.start()
    first = cluster.add()
    cluster.wait_for_workers(first)
    second = cluster.add()
    assert "came with the same --node-rank; each machine needs its own" in str(cluster.end_of(second))
    assert not second.workers.links and cluster.exits.empty()


def test_another_token_opens_nothing(cluster, monkeypatch):
    cluster.start()
    monkeypatch.setenv("SHOAL_CLUSTER_TOKEN", "another-token-than-that")
    error = cluster.end_of(cluster.add())
    assert isinstance(error, ConfigError) and "does not take this node's cluster token" in str(error)
    assert "connections without this cluster's token were turned away" in cluster.launcher.describe(2)


def test_another_address_than_the_master_is_told_at_once(cluster, caplog, monkeypatch):
    monkeypatch.setenv("SHOAL_HOST_IP", "127.0.0.2")
    cluster.start()
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith("SHOAL_HOST_IP=127.0.0.2 has the workers of the other nodes come to 127.0.0.2 (lo)")
    assert "and not to 127.0.0.1 (lo), the address of --master-addr" in said


def test_an_interface_that_is_none_is_told_at_once(cluster, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    with pytest.raises(ConfigError, match="GLOO_SOCKET_IFNAME=eth77 allows no interface of this machine"):
        cluster.start()


def test_nobody_waits_for_ever(cluster, caplog):
    caplog.set_level("INFO", "shoal")
    agent = cluster.add(config=cluster.config(node_rank=1, startup_timeout=2.0))
    error = str(cluster.end_of(agent))
    port = cluster.options["master_port"]
    assert f"node 0 did not answer at 127.0.0.1:{port} within 2 s (--startup-timeout)" in error
    assert f"waiting for node 0 at 127.0.0.1:{port}" in caplog.text


def test_a_node_waits_for_node_0_no_longer_when_it_is_told_to_leave(cluster):
    agent = cluster.add()
    agent.leave("Ctrl-C")
    assert cluster.end_of(agent) is None


def test_without_a_token_neither_side_starts(monkeypatch, tmp_path):
    monkeypatch.delenv("SHOAL_CLUSTER_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    cluster = Cluster()
    for start in (cluster.launcher.token, cluster.add):
        with pytest.raises(ConfigError, match="SHOAL_CLUSTER_TOKEN=TOKEN in the environment, --token-file FILE"):
            start()


def test_an_address_that_is_not_node_0s():
    with pytest.raises(ConfigError, match=r"master_addr 192.0.2.77 is no address of this machine.*It has: .*127.0.0.1"):
        Cluster(master_addr="192.0.2.77").launcher.listen_address()


def test_a_port_that_is_taken():
    with contextlib.closing(network.listen("127.0.0.1", 0)) as holder:
        cluster = Cluster(master_port=network.port_of(holder))
        with pytest.raises(StartupError, match=rf"taken by .*pid {os.getpid()}.*--master-port, the same on every node"):
            cluster.start()
        cluster.launcher.stop(0.0)
        assert not cluster.launcher.workers.links


def test_what_is_no_message_is_refused(cluster):
    cluster.start()
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        network.present_token(stranger, TOKEN)
        stranger.connect(f"tcp://127.0.0.1:{cluster.options['master_port']}")
        stranger.send(b"\x80\x04N.")
        assert stranger.poll(10_000) and b"no message of this version" in stranger.recv()
    cluster.wait_for_workers(cluster.add())  # and node 0 lives


def test_replicas_fill_the_nodes_one_after_the_other():
    with contextlib.closing(Cluster(tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=2)) as cluster:
        config = cluster.config()
        second = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, data_rank=1))
        assert ranks_on(config.parallel, 0) == [0] and ranks_on(config.parallel, 1) == []
        assert ranks_on(second.parallel, 0) == [] and ranks_on(second.parallel, 1) == [0]
        cluster.launcher = Launcher(second)
        cluster.start()
        there = dataclasses.replace(second.parallel, node_rank=1)
        agent = cluster.add(config=dataclasses.replace(second, parallel=there))
        cluster.wait_for_workers(agent, 1)
        assert not cluster.launcher.workers.links


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.data())
def test_every_rank_has_one_place(tensor, pipeline, data, draw):
    total = tensor * pipeline * data
    num_nodes = draw.draw(st.sampled_from([nodes for nodes in range(1, total + 1) if total % nodes == 0]))
    places = []
    for replica in range(data):
        parallel = ParallelConfig(
            tensor_size=tensor, pipeline_size=pipeline, data_size=data, data_rank=replica, num_nodes=num_nodes
        )
        ranks = [rank for node in range(num_nodes) for rank in ranks_on(parallel, node)]
        assert ranks == list(range(parallel.world_size))
        places += [(node_of(parallel, rank), index_on_node(parallel, rank)) for rank in ranks]
        per_node = total // num_nodes
        if per_node % tensor == 0:  # a tensor group that fits a machine is on one
            assert all(node_of(parallel, rank) == node_of(parallel, rank // tensor * tensor) for rank in ranks)
    assert places == [(node, index) for node in range(num_nodes) for index in range(total // num_nodes)]
