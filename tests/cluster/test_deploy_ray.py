"""`shoal deploy` on a Ray of one machine: replicas come and go under load, and whatever is killed, no request fails."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.deployed import PORT, Deployed, Load, deployment
from tests.executor.engines import is_running, wait_until
from tests.namespaces import needs_namespaces

pytestmark = needs_namespaces


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def pid_of(deployed: Deployed, word: str) -> int:
    (pid,) = [pid for pid in deployed.host.pids() if word in Path(f"/proc/{pid}/cmdline").read_text()]
    return pid


def replicas(deployed: Deployed) -> list[dict[str, Any]]:
    return list(deployed.status()["models"][0]["replicas"])


def pids(deployed: Deployed) -> dict[str, int]:
    return {replica["name"]: replica["pid"] for replica in replicas(deployed)}


@contextmanager
def load_on(deployed: Deployed, num_clients: int, **options: int) -> Iterator[Load]:
    """Ended at the end of the block, where no request may have failed."""
    load = Load(deployed, num_clients, **options)
    load.start()
    try:
        yield load
    except BaseException:
        load.stop()
        raise
    load.end()


def test_one_to_three_replicas_and_back_without_a_failed_request():
    with deployment() as deployed:
        deployed.deploy_fake(deployed.file())
        with load_on(deployed, 16) as load:
            deployed.wait_until(lambda: len(deployed.serving()) == 3)
            load.num_clients = 1
            deployed.wait_until(lambda: len(deployed.serving()) == 1)


@pytest.mark.slow
def test_what_is_killed_comes_back_and_no_request_fails():
    with deployment() as deployed:
        deployed.deploy_fake(deployed.file(replicas=2))
        before = pids(deployed)
        with load_on(deployed, 4):
            # The controller: it finds what it had, and starts nothing twice.
            os.kill(pid_of(deployed, "ray::ControllerActor"), signal.SIGKILL)
            assert pids(deployed) == before
            # A server: its actor starts it again.
            os.kill(before["fake-1"], signal.SIGKILL)
            deployed.wait_until(lambda: pids(deployed)["fake-1"] not in (None, before["fake-1"]))
            deployed.wait_until(lambda: len(deployed.serving()) == 2)
            assert [replica["restarts"] for replica in replicas(deployed)] == [1, 0]
            # An actor: its server lets its requests finish and goes, and another replica comes.
            os.kill(parent_of(parent_of(before["fake-2"])), signal.SIGKILL)
            deployed.wait_until(lambda: set(pids(deployed)) == {"fake-1", "fake-3"})
            deployed.wait_until(lambda: len(deployed.serving()) == 2)
            wait_until(lambda: not is_running(before["fake-2"]))
        # The router: it is started again on its port. Until then there is none, so this is without load.
        router = deployed.status()["router_pid"]
        os.kill(router, signal.SIGKILL)
        deployed.wait_until(lambda: deployed.status()["router_pid"] not in (None, router))
        deployed.wait_until(lambda: len(deployed.serving()) == 2)


@pytest.mark.slow
def test_a_changed_file_replaces_one_replica_at_a_time():
    with deployment() as deployed:
        deployed.deploy_fake(deployed.file(replicas=2))
        shown = deployed.shoal("status")
        assert "fake  2 wanted (2 to 2), as it shall be" in shown and f"router  {deployed.url}/v1  ready" in shown
        before = replicas(deployed)
        with load_on(deployed, 4):
            deployed.shoal(deployed.file(replicas=2, serve={"device": "cpu", "max_num_seqs": 5}))
            after = replicas(deployed)
            assert len(after) == 2 and all(replica["in_router"] for replica in after)
            assert not {each["revision"] for each in before} & {each["revision"] for each in after}
            # One that does not come up changes nothing, and says why.
            said = deployed.shoal(deployed.file(replicas=2, model="broken"), fails=True)
            assert "the weights of broken are broken. What ran before stays" in said
            deployed.wait_until(
                lambda: replicas(deployed) and pids(deployed).keys() == {each["name"] for each in after}
            )
            assert "the last change was not made: " in deployed.shoal("status")
            # How many there are changes without a replacement.
            deployed.shoal(deployed.file(replicas=1, serve={"device": "cpu", "max_num_seqs": 5}))
            (left,) = replicas(deployed)
            assert left["name"] in {each["name"] for each in after}


@pytest.mark.slow
def test_a_node_that_is_gone_takes_no_request_along():
    with deployment(2) as deployed:
        (other,) = deployed.others
        deployed.start_nodes()
        deployed.deploy_fake(deployed.file(replicas=2))
        before = {replica["node"]: replica["name"] for replica in replicas(deployed)}
        assert before.keys() == {deployed.host.address, other.address}
        assert deployed.status()["router_pid"] in deployed.host.pids(), "the router is where `shoal deploy` was called"
        with load_on(deployed, 4):
            other.kill_all()
            deployed.wait_until(lambda: before[other.address] not in pids(deployed))
            deployed.wait_until(lambda: len(deployed.serving()) == 2)
        after = replicas(deployed)
        assert {replica["node"] for replica in after} == {deployed.host.address}
        assert before[deployed.host.address] in {replica["name"] for replica in after}
        assert "The deployment has ended." in deployed.shoal("stop"), "the cluster is not its own"
        deployed.host.run(sys.executable, "-m", "shoal.cli", "node", "stop", env=deployed.environment)


@pytest.mark.slow
def test_a_router_whose_node_is_gone_comes_back_on_another():
    with deployment(2) as deployed:
        (other,) = deployed.others
        deployed.start_nodes()
        deployed.deploy_fake(deployed.file(), on=other)
        router = deployed.status()["router_pid"]
        assert router in other.pids()
        other.kill_all()
        deployed.wait_until(lambda: deployed.status()["router_state"] == "ready" and bool(deployed.serving()))
        assert deployed.status()["router_pid"] in deployed.host.pids()
        deployed.shoal("stop")
        deployed.host.run(sys.executable, "-m", "shoal.cli", "node", "stop", env=deployed.environment)


@pytest.mark.slow
def test_a_first_deployment_that_does_not_come_up_leaves_nothing():
    with deployment() as deployed:
        assert "Nothing is deployed here" in deployed.shoal("status", fails=True)
        said = deployed.shoal(deployed.file(model="/there/is/nothing"), fails=True)
        assert "fake could not be deployed" in said and "/there/is/nothing" in said
        assert "Nothing of the deployment is left" in said
        deployed.host.wait_until_empty(5)


@pytest.mark.slow
def test_a_router_whose_port_is_taken_is_told_and_nothing_is_left():
    with deployment() as deployed:
        deployed.start_nodes()
        listen = f"import socket, time; s = socket.create_server(('127.0.0.1', {PORT})); time.sleep(600)"
        holder = deployed.host.popen(sys.executable, "-c", listen)
        with pytest.raises(AssertionError, match=f"router does not come up: .*port {PORT} .* is taken by python.*left"):
            deployed.deploy_fake(deployed.file())
        holder.kill()
        holder.wait()
        assert "Nothing is deployed here" in deployed.shoal("status", fails=True)
        deployed.host.run(sys.executable, "-m", "shoal.cli", "node", "stop", env=deployed.environment)
