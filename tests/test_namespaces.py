"""The hosts that tests of several machines run on are what those tests take them for."""

from __future__ import annotations

import socket
import subprocess
import sys

import psutil
import pytest

from tests.namespaces import Network, connected_hosts, needs_namespaces

pytestmark = needs_namespaces

_ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        while data := connection.recv(65536):
            connection.sendall(data)
"""


@pytest.fixture(scope="module")
def network():
    with connected_hosts(3) as network:
        yield network


def start_echo(host):
    process = host.popen(sys.executable, "-c", _ECHO, host.address, stdout=subprocess.PIPE, text=True)
    return int(process.stdout.readline())


def ask(connection, data=b"hello"):
    connection.sendall(data)
    return receive(connection, len(data))


def receive(connection, size):
    data = b""
    while len(data) < size:
        data += connection.recv(size - len(data)) or pytest.fail("the connection ended")
    return data


def test_a_name_resolves_to_the_loopback_and_homes_are_apart(network: Network):
    code = (
        "import os, socket; print(socket.gethostname(), socket.gethostbyname(socket.gethostname()), os.environ['HOME'])"
    )
    seen = [host.python(code).split() for host in network.hosts]
    assert [name for name, _, _ in seen] == ["node1", "node2", "node3"]
    assert [address for _, address, _ in seen] == ["127.0.0.1", "127.0.1.1", "127.0.0.1"]
    assert len({home for _, _, home in seen}) == 3
    assert socket.gethostname() != "node3"  # this machine's own name is untouched


def test_hosts_reach_each_other_and_bytes_are_counted(network: Network):
    first, second, _ = network.hosts
    port = start_echo(second)
    before = first.bytes_sent(), second.bytes_received()
    with first.entered(), socket.create_connection((second.address, port), timeout=5) as connection:
        assert ask(connection, b"x" * 100_000) == b"x" * 100_000
    for counted in (first.bytes_sent() - before[0], second.bytes_received() - before[1]):
        assert 100_000 < counted < 120_000
    with pytest.raises(OSError):  # from outside there is no way in
        socket.create_connection((second.address, port), timeout=0.2)


@pytest.mark.parametrize("silent", [True, False])
def test_a_link_is_cut_and_healed(network: Network, silent: bool):
    first, second, third = network.hosts
    port, other_port = start_echo(second), start_echo(third)
    with (
        first.entered(),
        socket.create_connection((second.address, port), timeout=10) as connection,
        socket.create_connection((third.address, other_port), timeout=10) as other,
    ):
        assert ask(connection) == b"hello"
        network.cut(second, silent=silent)
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            ask(connection)
        assert ask(other) == b"hello"
        network.heal(second)
        connection.settimeout(10)
        assert receive(connection, 5) == b"hello"  # sent while the link was cut, and delivered now


def test_nothing_is_left_not_even_orphans():
    with connected_hosts(2) as network:
        host = network.hosts[0]
        orphan = int(host.run("sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"))
        assert orphan in host.pids()
        with pytest.raises(AssertionError, match="still runs.*sleep 600"):
            host.wait_until_empty(0.1)
    # Dead at least: who reaps an orphan, and when, is this machine's own affair.
    assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE
    assert network.name not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout


def test_a_command_that_fails_is_told_with_its_output(network: Network):
    with pytest.raises(AssertionError, match="ended with 3"):
        network.hosts[0].python("import sys; print('so', file=sys.stderr); sys.exit(3)")
