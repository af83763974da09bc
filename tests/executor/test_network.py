"""Workers that are linked over TCP: tokens, keys, steps and results by ZeroMQ, beats, links that are cut."""

from __future__ import annotations

import os
import signal

import pytest

from shoal.errors import EngineDeadError, StartupError
from shoal.messages import StartupProgress
from tests.executor.engines import (
    ignore,
    is_running,
    make_batch,
    pids,
    run_step,
    stand_ins,
    wait_until,
)
from tests.namespaces import Network, connected_hosts, needs_namespaces

TOKEN = "the-token-of-this-test"
# The last rank answers, and is the one on the other host.
STAGES = {"tensor_size": 1, "pipeline_size": 2}


@pytest.fixture(scope="module")
def network():
    with connected_hosts(2) as network:
        yield network


def on(network: Network) -> dict:
    return {"address": network.hosts[0].address, "token": TOKEN, "other": network.hosts[1]}


def test_workers_on_this_host_over_tcp(tmp_path):
    with stand_ins(tmp_path, hosts={"address": "127.0.0.1", "token": TOKEN}) as executor:
        executor.start(ignore)
        assert run_step(executor, 1) == [(0, [1]), (1, [2])]


def test_a_worker_with_another_token_is_refused_and_says_so(tmp_path, capfd):
    hosts = {"address": "127.0.0.1", "token": TOKEN, "worker_token": "another-token-than-that"}
    with stand_ins(tmp_path, hosts=hosts) as executor, pytest.raises(StartupError, match=r"rank \d .*exit code 4"):
        executor.start(ignore)
    assert "refuses this worker: it has another cluster token" in capfd.readouterr().err


@needs_namespaces
def test_steps_and_results_between_hosts(tmp_path, network):
    with stand_ins(tmp_path, "own-board@1", hosts=on(network), **STAGES) as executor:
        with network.hosts[0].entered():
            facts = executor.start(ignore)
        assert facts["hosts"] == [os.uname().nodename, "node2"]
        assert [run_step(executor, step_id)[1] for step_id in range(1, 20)] == [(1, [n + 1]) for n in range(1, 20)]
        executor.execute(make_batch(20))
        assert executor.sample(20, {0: bytes(5 << 20)}).result(60).results[0].token_ids == [20 + (5 << 20)]


@needs_namespaces
def test_variables_of_the_executors_host_reach_the_others(tmp_path, network, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    with stand_ins(tmp_path, "own-board@1", hosts=on(network), **STAGES) as executor:
        with network.hosts[0].entered():
            executor.start(ignore)
        assert executor._bring_up is not None
        here, there = (state.loaded.facts["environment"] for state in executor._bring_up.states)
        assert there["NCCL_DEBUG"] == "WARN" and here == {}, "it has them from its parent"


@needs_namespaces
def test_a_worker_that_cannot_open_its_connection_for_steps_is_named_before_anything_is_loaded(tmp_path, network):
    phases: list[str] = []
    with stand_ins(tmp_path, "own-board@1", hosts=on(network), startup_timeout=4.0, **STAGES) as executor:

        def close_the_other_port(progress: StartupProgress) -> None:
            phases.append(progress.phase)
            assert executor._hub is not None
            executor._hub.steps_endpoint = f"tcp://{network.hosts[0].address}:9"

        with network.hosts[0].entered(), pytest.raises(StartupError) as caught:
            executor.start(close_the_other_port)
    assert f"start-up phase 'link': rank 1 (node2 {network.hosts[1].address} on" in str(caught.value)
    assert ":9 (does a firewall let its other port pass only?) within 4 s" in str(caught.value)
    assert "load weights" not in phases[: phases.index("link workers")] and "size the KV cache" not in phases


@needs_namespaces
def test_a_link_that_is_cut_while_serving(tmp_path, network):
    told: list[EngineDeadError] = []
    with stand_ins(tmp_path, "own-board@1", hosts=on(network), **STAGES) as executor:
        executor.lost_seconds = 2.0
        executor.watch(told.append)
        with network.hosts[0].entered():
            executor.start(ignore)
        run_step(executor, 1)
        network.cut(network.hosts[1])
        try:
            wait_until(lambda: told)
        finally:
            network.heal(network.hosts[1])
        assert f"nothing was heard of rank 1 (node2 {network.hosts[1].address}, pid" in str(told[0])


@needs_namespaces
def test_a_step_that_does_not_end_is_explained_from_what_the_other_host_sent(tmp_path, network):
    with stand_ins(tmp_path, "own-board", hosts=on(network), step_timeout=2.0, **STAGES) as executor:
        with network.hosts[0].entered():
            executor.start(ignore)
        run_step(executor, 1)
        os.kill(pids(tmp_path)[0], signal.SIGSTOP)
        executor.execute(make_batch(2))
        with pytest.raises(EngineDeadError) as caught:
            executor.sample(2).result(60)
    text = str(caught.value)
    assert "rank 0 (" in text and "is stopped" in text and "rank 1 waits for" in text


@needs_namespaces
def test_a_worker_of_the_other_host_that_is_stopped_is_named(tmp_path, network):
    with stand_ins(tmp_path, "own-board", hosts=on(network), step_timeout=3.0, **STAGES) as executor:
        with network.hosts[0].entered():
            executor.start(ignore)
        run_step(executor, 1)
        remote = pids(tmp_path)[1]
        os.kill(remote, signal.SIGSTOP)
        executor.execute(make_batch(2))
        with pytest.raises(EngineDeadError) as caught:
            executor.sample(2).result(60)
    assert f"nothing was heard of rank 1 (node2 {network.hosts[1].address}, pid {remote}) for " in str(caught.value)


@needs_namespaces
@pytest.mark.slow
def test_a_worker_that_is_cut_off_ends_by_itself(tmp_path, network):
    with stand_ins(tmp_path, "own-board@1", hosts=on(network), **STAGES) as executor:
        with network.hosts[0].entered():
            executor.start(ignore)
        remote = pids(tmp_path)[1]
        network.cut(network.hosts[1])
        try:
            wait_until(lambda: not is_running(remote), 30.0)
        finally:
            network.heal(network.hosts[1])
