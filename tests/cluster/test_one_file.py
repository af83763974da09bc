"""Which machine of a list this one is, and what it is started with then."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal import network
from shoal.cluster import one_file
from shoal.config.options import ModelOptions, ParallelOptions, ServerOptions
from shoal.errors import ConfigError


@pytest.fixture(autouse=True)
def this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        network.Interface("eth0", "10.0.0.2"),
        network.Interface("eth1", "10.9.0.2"),
        network.Interface("lo", "127.0.0.1"),
    ]
    monkeypatch.setattr("shoal.network.interfaces", lambda: found)
    monkeypatch.setattr("shoal.network.addresses.interfaces", lambda: found)
    names = {"head.example": ["10.0.0.1"], "second": ["127.0.1.1"], "both": ["fd00::2", "10.0.0.2"]}

    def resolve(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if host not in names:
            raise one_file.socket.gaierror("no such name")
        return [(0, 0, 0, "", (address, 0)) for address in names[host]]

    monkeypatch.setattr("shoal.cluster.one_file.socket.getaddrinfo", resolve)
    for name in ("SHOAL_HOST_IP", "VLLM_HOST_IP", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_DISABLE"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


def place(*nodes: str, port: int = 8000, **options: object) -> tuple[ParallelOptions, ServerOptions, one_file.Place]:
    return one_file.take_place(
        ModelOptions(device="cpu"), ParallelOptions(nodes=list(nodes), **options), ServerOptions(port=port)
    )


def test_a_machine_finds_itself_by_its_addresses() -> None:
    parallel, server, found = place("10.0.0.1:8001", "10.0.0.2:8002", port=7000)
    assert (parallel.nnodes, parallel.node_rank, parallel.master_addr) == (2, 1, "10.0.0.1")
    assert (server.host, server.port, found.head) == ("10.0.0.2", 8002, "10.0.0.1:8001")
    assert (parallel.tensor_parallel_size, parallel.pipeline_parallel_size) == (1, 2)
    parallel, server, found = place("both", "10.0.0.3", port=7000)
    assert (parallel.node_rank, parallel.master_addr, server.port, found.head) == (0, "10.0.0.2", 7000, "10.0.0.2:7000")
    # A head by name: it is resolved again when it is asked, since its address may come late.
    parallel, _, found = place("head.example:8001", "10.9.0.2")
    assert (parallel.master_addr, found.address, found.head) == ("head.example", "10.9.0.2", "10.0.0.1:8001")
    assert place("later.example", "10.0.0.2")[0].master_addr == "later.example"


def test_degrees_that_are_given_stay() -> None:
    parallel, _, _ = place("10.0.0.1", "10.0.0.2", tensor_parallel_size=2)
    assert (parallel.tensor_parallel_size, parallel.pipeline_parallel_size) == (2, 1)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (["10.0.0.1", "10.0.0.3"], r"this machine \(eth0 10.0.0.2, .*\) is none of nodes: 10.0.0.1, 10.0.0.3"),
        (["10.0.0.1", "second"], "second leads to 127.0.1.1 here, .*look in /etc/hosts"),
        (["10.0.0.1", "nowhere"], r"nowhere \(does not resolve here\)"),
        (["10.0.0.2", "10.9.0.2"], r"nodes\[0\], 10.0.0.2, and nodes\[1\], 10.9.0.2, are both this machine"),
        (["10.0.0.2:1", "10.0.0.2:2"], r"nodes\[0\] and nodes\[1\] are the same machine"),
        (["10.0.0.2:x"], "is no HOST:PORT"),
    ],
)
def test_a_list_in_which_it_is_not_to_be_found(nodes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(*nodes)


def test_what_goes_against_the_list() -> None:
    with pytest.raises(ConfigError, match="give one of the two"):
        place("10.0.0.1", "10.0.0.2", nnodes=2)
    with pytest.raises(ConfigError, match="eth7 is none of this machine's: eth0"):
        place("10.0.0.1", "10.0.0.2", communication_interface="eth7")


def test_transport(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment = one_file.env.subprocess_environment
    place("10.0.0.1", "10.0.0.2", communication_protocol="tcp")
    assert (environment()["NCCL_IB_DISABLE"], environment()["SHOAL_HOST_IP"]) == ("1", "10.0.0.2")
    monkeypatch.setattr(one_file, "_INFINIBAND", tmp_path)
    with pytest.raises(ConfigError, match="rdma needs an active InfiniBand or RoCE port"):
        place("10.0.0.1", "10.0.0.2", communication_protocol="rdma")
    (tmp_path / "mlx5_0/ports/1").mkdir(parents=True)
    (tmp_path / "mlx5_0/ports/1/state").write_text("1: DOWN\n")
    with pytest.raises(ConfigError, match="and this machine has 1: DOWN"):
        place("10.0.0.1", "10.0.0.2", communication_protocol="rdma")
    (tmp_path / "mlx5_0/ports/1/state").write_text("4: ACTIVE\n")
    place("10.0.0.1", "10.0.0.2", communication_protocol="rdma", communication_interface="eth1")
    assert environment()["GLOO_SOCKET_IFNAME"] == environment()["NCCL_SOCKET_IFNAME"] == "eth1"
