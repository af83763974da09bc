"""The same file on every machine: `shoal serve --config FILE`, started in any order; each finds its place by itself."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import openai
import pytest

from tests.multihost.served import PROMPTS, TOKEN, Server, complete, tokens_of_one_process
from tests.namespaces import Network, connected_hosts, needs_namespaces

pytestmark = needs_namespaces

_NUM_TOKENS = 16
_PORTS = (8000, 8101, 8202)


def write_file(path: Path, network: Network, *lines: str) -> Path:
    nodes = [f"  - {{host: {host.address}, port: {port}}}" for host, port in zip(network.hosts, _PORTS, strict=False)]
    text = [
        "nodes:", *nodes, "model: {path: shoal-tiny, type: small}", "communication: {protocol: tcp, timeout: 60}",
        "max-model-len: 512", "startup-timeout: 60", *lines,
    ]  # fmt: skip
    path.write_text("\n".join(text) + "\n")
    return path


def start(network: Network, file: Path, order: list[int]) -> dict[int, Server]:
    environment = {"SHOAL_CLUSTER_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    return {
        rank: Server(network.hosts[rank], file.with_name(f"node{rank}.log"), ["--config", str(file)], environment)
        for rank in order
    }


def answers(network: Network, rank: int) -> list[list[int]]:
    """From the port of this machine, asked on it."""
    host = network.hosts[rank]
    with host.entered():
        client = openai.OpenAI(
            base_url=f"http://{host.address}:{_PORTS[rank]}/v1", api_key="none", max_retries=0, timeout=60
        )
        with client:
            return [complete(client, prompt, _NUM_TOKENS)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("num_hosts", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_machines_find_their_places_serve_and_end_together(tmp_path: Path, num_hosts: int) -> None:
    expected = tokens_of_one_process(PROMPTS, _NUM_TOKENS, max_model_len=512)
    with connected_hosts(num_hosts) as network:
        file = write_file(tmp_path / "config.yaml", network)
        # The one that serves comes last.
        servers = start(network, file, list(reversed(range(num_hosts))))
        for rank, server in servers.items():
            server.until(r"at http://.*/v1" if rank == 0 else r" is in: shoal-tiny")
            assert f"number {rank + 1} of {num_hosts}" in server.output
        assert f"--pipeline-parallel-size {num_hosts}" in servers[0].output and "small" in servers[0].output
        assert answers(network, 0) == expected
        assert answers(network, num_hosts - 1) == expected
        servers[0].process.send_signal(signal.SIGTERM)
        assert [server.exit_code(20) for server in servers.values()] == [0] * num_hosts
        for host in network.hosts:
            host.wait_until_empty(10)


def test_one_machine_that_goes_ends_all(tmp_path: Path) -> None:
    with connected_hosts(2) as network:
        servers = start(network, write_file(tmp_path / "config.yaml", network), [0, 1])
        servers[0].until(r"at http://.*/v1")
        servers[1].process.kill()
        assert servers[0].exit_code(20) == 1
        assert "node2" in servers[0].output
        for host in network.hosts:
            host.wait_until_empty(10)


def test_on_a_ray_cluster_whose_status_shows_it(tmp_path: Path) -> None:
    expected = tokens_of_one_process(PROMPTS, _NUM_TOKENS, max_model_len=512)
    with connected_hosts(2) as network:
        file = write_file(tmp_path / "config.yaml", network, "distributed_executor_backend: ray")
        servers = start(network, file, [1, 0])
        servers[0].until(r"at http://.*/v1")
        servers[1].until(r" is in: shoal-tiny")
        assert answers(network, 1) == expected
        for host in network.hosts:
            command = (sys.executable, "-m", "shoal.cli", "status", "--json")
            status = json.loads(host.run(*command, env={"SHOAL_CLUSTER_TOKEN": TOKEN}))
            assert {(node["address"], node["state"]) for node in status["nodes"]} == {
                (each.address, "alive") for each in network.hosts
            }
        # Whichever goes, all go, and nothing is left of the nodes.
        servers[1].process.send_signal(signal.SIGTERM)
        assert [server.exit_code(40) for server in (servers[1], servers[0])] == [0, 1]
        assert "has ended; all machines of the file end together" in servers[0].output
        for host in network.hosts:
            host.wait_until_empty(10)


def test_a_node_of_another_cluster_is_left_alone(tmp_path: Path) -> None:
    with connected_hosts(2) as network:
        host, shoal = network.hosts[0], (sys.executable, "-m", "shoal.cli")
        host.run(*shoal, "node", "start", "--head", "--port", "7000", env={"SHOAL_CLUSTER_TOKEN": TOKEN})
        server = start(
            network, write_file(tmp_path / "config.yaml", network, "distributed_executor_backend: ray"), [0]
        )[0]
        assert server.exit_code(60) == 1
        assert "a node of the cluster" in server.output and "runs on this machine already" in server.output
        assert "alive" in host.run(*shoal, "status", env={"SHOAL_CLUSTER_TOKEN": TOKEN})
        host.run(*shoal, "node", "stop")


@pytest.mark.slow
def test_what_a_killed_process_left_is_taken_over_and_goes_with_its_node(tmp_path: Path) -> None:
    with connected_hosts(2) as network:
        file = write_file(tmp_path / "config.yaml", network, "distributed_executor_backend: ray")
        servers = start(network, file, [1, 0])
        servers[0].until(r"at http://.*/v1")
        servers[1].process.kill()
        servers[1].process.wait()
        again = start(network, file, [1])[1]
        again.until("taking over the node")
        again.until(r" is in: shoal-tiny")
        expected = tokens_of_one_process(PROMPTS, _NUM_TOKENS, max_model_len=512)
        assert answers(network, 1) == expected
        network.hosts[1].run(sys.executable, "-m", "shoal.cli", "node", "stop")
        assert [again.exit_code(40), servers[0].exit_code(40)] == [1, 1]
        assert "this machine's node has been ended" in again.output
        for host in network.hosts:
            host.wait_until_empty(10)


def test_a_machine_that_is_not_in_the_file(tmp_path: Path) -> None:
    with connected_hosts(3) as network:
        file = write_file(tmp_path / "config.yaml", network)
        file.write_text("\n".join(line for line in file.read_text().splitlines() if str(_PORTS[2]) not in line))
        server = start(network, file, [2])[2]
        assert server.exit_code(30) == 2
        addresses = ", ".join(host.address for host in network.hosts[:2])
        assert f"is none of nodes: {addresses}" in server.output and network.hosts[2].address in server.output
