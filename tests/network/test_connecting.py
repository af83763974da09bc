"""Connections on ways that lose packets, that nobody answers, and that are refused."""

from __future__ import annotations

import errno
import socket
import threading
import time

import pytest

from shoal.network import connect
from tests.namespaces import connected_hosts


def test_it_connects_and_waits_for_ever_on_reads():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        connect("127.0.0.1", listener.getsockname()[1], timeout=5, bind="127.0.0.1") as connection,
    ):
        other, address = listener.accept()
        with other:
            assert address == connection.getsockname() and connection.gettimeout() is None
            other.sendall(b"word")
            assert connection.recv(4) == b"word"


def test_ipv6():
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    with listener:
        connect("::1", listener.getsockname()[1], timeout=5).close()


def test_a_refusal_is_told_at_once():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        connect("127.0.0.1", port, timeout=30)
    with pytest.raises(OSError) as caught:
        connect("127.0.0.1", port, timeout=30, bind="192.0.2.7")
    assert caught.value.errno == errno.EADDRNOTAVAIL
    assert time.monotonic() - start < 15


def test_lost_packets_cost_less_than_tcp_waits():
    """TCP itself would try again 1 and 3 s after the first packet."""
    with connected_hosts(2) as network:
        here, there = network.hosts
        with there.entered():
            listener = socket.create_server(("", 7001))
        with here.entered(), listener:
            connect(there.address, 7001, timeout=5).close()  # who has the address is known from here on
            network.cut(there)
            healing = threading.Timer(1.4, network.heal, (there,))
            healing.start()
            try:
                connect(there.address, 7001, timeout=2.8).close()
            finally:
                healing.join()


def test_nobody_said_for_seconds_who_has_the_address():
    """The system gives the question up after 3 s, and every connection with it."""
    with connected_hosts(2) as network:
        here, there = network.hosts
        with there.entered():
            listener = socket.create_server(("", 7001))
        network.cut(there)
        with here.entered(), listener:
            with pytest.raises(TimeoutError, match="no answer within 0.6 s"):
                connect(there.address, 7001, timeout=0.6)
            healing = threading.Timer(3.5, network.heal, (there,))
            healing.start()
            try:
                connect(there.address, 7001, timeout=20).close()
            finally:
                healing.join()


def test_a_route_that_says_no_is_told_at_once():
    with connected_hosts(2) as network:
        here = network.hosts[0]
        here.run("ip", "route", "add", "unreachable", "192.0.2.0/24")
        start = time.monotonic()
        with here.entered():
            for target in ("192.0.2.1", "198.51.100.1"):
                with pytest.raises(OSError) as caught:
                    connect(target, 7001, timeout=30)
                assert caught.value.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH), target
        assert time.monotonic() - start < 15
