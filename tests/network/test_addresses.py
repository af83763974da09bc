from __future__ import annotations

import socket

import psutil
import pytest

from shoal import network
from shoal.errors import ConfigError
from shoal.network import addresses

VARIABLES = ("SHOAL_HOST_IP", "VLLM_HOST_IP", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(monkeypatch):
    """A machine of our own making: its interfaces (up or not), and where its routes lead."""

    def make(*entries: tuple[str, str], routes: dict[str, str] | None = None, down: tuple[str, ...] = ()) -> None:
        by_name: dict[str, list] = {}
        for name, address in entries:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            by_name.setdefault(name, []).append(psutil._ntuples.snicaddr(family, address, None, None, None))
        stats = {name: psutil._ntuples.snicstats(name not in down, 2, 0, 1500, "") for name in by_name}
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: by_name)
        monkeypatch.setattr(psutil, "net_if_stats", lambda: stats)
        monkeypatch.setattr(addresses, "_route_to", lambda target: (routes or {}).get(target, (routes or {}).get("*")))

    return make


LOOPBACK = ("lo", "127.0.0.1")


def test_the_route_to_the_head_decides(machine):
    machine(LOOPBACK, ("eth0", "10.0.0.4"), ("ib0", "10.1.0.4"), routes={"10.1.0.1": "10.1.0.4", "*": "10.0.0.4"})
    assert network.host_address("10.1.0.1") == "10.1.0.4"
    assert network.host_address("10.0.0.1") == "10.0.0.4"
    assert network.host_address() == "10.0.0.4"  # the default route, where there is no head yet


def test_a_host_ip_must_be_one_of_this_machine(machine, monkeypatch):
    machine(LOOPBACK, ("eth0", "10.0.0.4"), ("ib0", "10.1.0.4"), routes={"*": "10.0.0.4"})
    monkeypatch.setenv("VLLM_HOST_IP", "10.1.0.4")
    assert network.host_address("10.0.0.1") == "10.1.0.4"
    monkeypatch.setenv("SHOAL_HOST_IP", "10.9.0.4")
    with pytest.raises(ConfigError, match="'10.9.0.4'.*eth0 10.0.0.4, ib0 10.1.0.4"):
        network.host_address()
    monkeypatch.setenv("SHOAL_HOST_IP", "node-b")
    with pytest.raises(ConfigError, match="must be an address"):
        network.host_address()


def test_the_variable_that_decides_is_named(monkeypatch):
    assert network.named_by() == ""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    assert network.named_by() == "GLOO_SOCKET_IFNAME=eth1"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=ib0")
    assert network.named_by() == "NCCL_SOCKET_IFNAME==ib0"
    monkeypatch.setenv("SHOAL_HOST_IP", "10.0.0.4")
    assert network.named_by() == "SHOAL_HOST_IP=10.0.0.4"


@pytest.mark.parametrize(
    ("pattern", "address"),
    [
        ("eth1", "10.0.1.4"),
        ("eth", "10.0.0.4"),  # a prefix of both: the one that routes to the head
        ("=eth1", "10.0.1.4"),
        ("ib,eth1", "10.2.0.4"),
        ("=nosuch,docker0", "172.17.0.1"),
        ("^docker,eth", "10.2.0.4"),
        ("^=eth0,eth10", "10.0.1.4"),
        ("eth1,eth10", "10.0.1.4"),
    ],
)
@pytest.mark.parametrize("variable", ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"])
def test_interfaces_can_be_named_as_for_nccl(machine, monkeypatch, variable, pattern, address):
    machine(
        LOOPBACK, ("eth10", "10.0.10.4"), ("eth0", "10.0.0.4"), ("eth1", "10.0.1.4"), ("ib0", "10.2.0.4"),
        ("docker0", "172.17.0.1"), ("eth0", "fd00::4"), routes={"10.0.0.1": "10.0.0.4"},
    )  # fmt: skip
    monkeypatch.setenv(variable, pattern)
    assert network.host_address("10.0.0.1") == address


def test_a_pattern_that_allows_nothing_names_what_there_is(machine, monkeypatch):
    machine(LOOPBACK, ("eno1", "10.0.0.4"), ("eth0", "10.5.0.4"), routes={"*": "10.0.0.4"}, down=("eth0",))
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    with pytest.raises(ConfigError, match="NCCL_SOCKET_IFNAME=eth0 allows no interface.*lo 127.0.0.1, eno1 10.0.0.4"):
        network.host_address("10.0.0.1")


def test_loopback_only_for_a_head_on_loopback(machine, monkeypatch):
    machine(LOOPBACK, ("eth0", "10.0.0.4"), routes={"127.0.0.1": "127.0.0.1", "10.0.0.1": "10.0.0.4"})
    assert network.host_address("127.0.0.1") == "127.0.0.1"
    monkeypatch.setenv("SHOAL_HOST_IP", "127.0.0.1")
    with pytest.raises(ConfigError, match="SHOAL_HOST_IP=10.0.0.4 \\(on eth0\\) would work"):
        network.host_address("10.0.0.1")
    monkeypatch.delenv("SHOAL_HOST_IP")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with pytest.raises(ConfigError, match="loopback"):
        network.host_address("10.0.0.1")


def test_a_machine_without_a_default_route(machine):
    machine(LOOPBACK, ("veth0", "10.7.0.1"))
    assert network.host_address() == "10.7.0.1"
    with pytest.raises(ConfigError, match="no route to the head at 10.8.0.1; it has: lo 127.0.0.1, veth0 10.7.0.1"):
        network.host_address("10.8.0.1")
    machine(LOOPBACK, ("eth0", "10.0.0.4"), ("eth1", "10.0.1.4"))
    with pytest.raises(ConfigError, match="SHOAL_HOST_IP=ADDRESS.*10.0.0.4 \\(eth0\\), 10.0.1.4 \\(eth1\\)"):
        network.host_address()
    machine(LOOPBACK)
    assert network.host_address() == "127.0.0.1"


def test_a_head_by_name(machine, monkeypatch):
    machine(LOOPBACK, ("eth0", "10.0.0.4"), routes={"10.0.0.1": "10.0.0.4", "fd00::1": "fd00::4"})
    names = {"head": ["fd00::1", "10.0.0.1"], "head6": ["fd00::1"], "self": ["127.0.1.1"], "localhost": ["127.0.0.1"]}

    def look_up(name, *_, **__):
        if name not in names:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in names[name]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert network.resolve_head("head") == "10.0.0.1"
    assert network.host_address("head") == "10.0.0.4"
    assert network.resolve_head("head6") == "fd00::1"
    assert network.resolve_head("[fd00::1]") == "fd00::1"
    assert network.resolve_head("localhost") == "127.0.0.1"
    with pytest.raises(ConfigError, match="self resolves to 127.0.1.1 on this machine.*eth0 10.0.0.4"):
        network.resolve_head("self")
    with pytest.raises(ConfigError, match="nobody does not resolve"):
        network.host_address("nobody")


def test_this_machine_as_it_is():
    assert network.host_address("127.0.0.1") == "127.0.0.1"
    for interface in network.interfaces():
        assert network.interface_of(interface.address) == interface.name
    assert network.interface_of("127.0.0.99") == network.interface_of("127.0.0.1")
    with pytest.raises(ConfigError, match="no interface of this machine has the address 192.0.2.77; there are: "):
        network.interface_of("192.0.2.77")
    with pytest.raises(ConfigError, match="'node7' is no IP address; this machine has: "):
        network.interface_of("node7")


@pytest.mark.parametrize(
    ("endpoint", "parts"),
    [
        ("head:6379", ("head", 6379)),
        ("10.0.0.1", ("10.0.0.1", 1)),
        ("[fd00::1]:7", ("fd00::1", 7)),
        ("fd00::1", ("fd00::1", 1)),
        ("[fd00::1]", ("fd00::1", 1)),
    ],
)
def test_endpoints(endpoint, parts):
    assert network.split_endpoint(endpoint, 1) == parts
    assert network.split_endpoint(network.format_endpoint(*parts)) == parts


@pytest.mark.parametrize("endpoint", ["head", "head:", ":6379", "head:port", "head:0", "head:70000", ""])
def test_what_is_no_endpoint(endpoint):
    with pytest.raises(ConfigError, match="is no HOST:PORT"):
        network.split_endpoint(endpoint)
