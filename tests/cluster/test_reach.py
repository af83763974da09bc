"""`shoal node start` with an address that the head has no way to, and a node that was started anew."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.cluster.test_node import shoal
from tests.namespaces import Host, connected_hosts, needs_namespaces

pytestmark = [needs_namespaces, pytest.mark.slow]


def add_network_to_nowhere(host: Host, address: str) -> None:
    for command in (
        "link add storage0 type veth peer name storage1",
        f"address add {address}/24 dev storage0",
        "link set storage0 up",
        "link set storage1 up",
    ):
        subprocess.run(["ip", "-n", host.namespace, *command.split()], check=True)


def test_an_address_that_the_head_does_not_reach():
    with connected_hosts(2) as hosts:
        head, other = hosts.hosts
        add_network_to_nowhere(other, "172.31.9.2")
        shoal(head, "node", "start", "--head", "--num-cpus", "1")
        token = (head.home / ".shoal" / "cluster-token").read_text().strip()
        join = ("node", "start", "--address", head.address, "--num-cpus", "1")
        for variables in ({"NCCL_SOCKET_IFNAME": "storage"}, {"SHOAL_HOST_IP": "172.31.9.2"}):
            said = shoal(other, *join, fails=True, SHOAL_CLUSTER_TOKEN=token, **variables)
            assert f"the head at {head.address}:6379 does not reach it at 172.31.9.2" in said, said
            assert other.pids() == []
        shoal(other, *join, SHOAL_CLUSTER_TOKEN=token)
        shoal(other, "node", "stop")
        shoal(other, *join, SHOAL_CLUSTER_TOKEN=token)
        table = shoal(head, "status")
        assert re.findall(rf"node2 +{other.address} +1 +0 +(\w+) +up ", table) == ["alive"], table
        for host in (other, head):
            shoal(host, "node", "stop")
