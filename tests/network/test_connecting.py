"""Connections on ways that lose packets, that nobody answers, and that are refused."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from shoal.network import connect
from tests.namespaces import Host, Network, connected_hosts


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


@contextmanager
def listening_host() -> Iterator[tuple[Network, Host]]:
    """A host that listens on port 7001, and its network. In the block this thread is on another host."""
    with connected_hosts(2) as network:
        here, there = network.hosts
        setting = "/proc/sys/net/ipv4/tcp_syn_linear_timeouts"  # Linux can be told to try again each second
        here.run("sh", "-c", f"test ! -e {setting} || echo 0 > {setting}")
        with there.entered():
            listener = socket.create_server(("", 7001))
        with here.entered(), listener:
            yield network, there


@contextmanager
def healed_after(seconds: float, network: Network, host: Host) -> Iterator[None]:
    healing = threading.Timer(seconds, network.heal, (host,))
    healing.start()
    try:
        yield
    finally:
        healing.join()


def test_lost_packets_cost_less_than_tcp_waits():
    """TCP itself tries again 1 and 3 s after the first packet."""
    with listening_host() as (network, there):
        connect(there.address, 7001, timeout=5).close()  # who has the address is known from here on
        network.cut(there)
        with healed_after(1.4, network, there):
            connect(there.address, 7001, timeout=2.8).close()


def test_nobody_said_for_seconds_who_has_the_address():
    """The system gives the question up after 3 s, and every connection with it."""
    with listening_host() as (network, there):
        network.cut(there)
        with pytest.raises(TimeoutError, match="no answer within 0.6 s"):
            connect(there.address, 7001, timeout=0.6)
        with healed_after(3.5, network, there):
            connect(there.address, 7001, timeout=20).close()


@pytest.mark.skipif(shutil.which("nft") is None, reason="nft is missing (Debian: apt-get install nftables)")
@pytest.mark.parametrize("seconds", [0.0, 0.12])
def test_a_firewall_that_says_no_is_no_silence(seconds):
    """Its answers are few a second: not every attempt gets one. seconds: each way takes."""
    with connected_hosts(2) as network:
        here, there = network.hosts
        if seconds:
            network.impair(there, seconds=seconds)
        there.run(
            "nft",
            "add table inet t; add chain inet t in { type filter hook input priority 0; };"
            "add rule inet t in tcp dport 7000-7999 reject with icmp host-prohibited",
        )

        def ask(port: int) -> int | None:
            with here.entered(), pytest.raises(OSError) as caught:
                connect(there.address, port, timeout=4)
            return caught.value.errno

        with ThreadPoolExecutor(14) as pool:
            found = list(pool.map(ask, range(7001, 7015)))
        time.sleep(2)
        start = time.monotonic()
        assert ask(7000) == errno.EHOSTUNREACH
        assert time.monotonic() - start < 3
    assert set(found) <= {errno.EHOSTUNREACH, errno.ETIMEDOUT} and found.count(errno.EHOSTUNREACH) >= 3, found


def test_many_at_once_open_few_files():
    with connected_hosts(2) as network:
        here, there = network.hosts
        network.cut(there)
        most = 0

        def ask(port: int) -> None:
            with here.entered(), pytest.raises(TimeoutError):
                connect(there.address, port, timeout=2.5)

        with ThreadPoolExecutor(32) as pool:
            before = len(os.listdir("/proc/self/fd"))
            asking = [pool.submit(ask, port) for port in range(7000, 7032)]
            while not all(each.done() for each in asking):
                most = max(most, len(os.listdir("/proc/self/fd")) - before)
                time.sleep(0.05)
            for each in asking:
                each.result()
    assert most <= 32 * 7  # besides attempts: a selector, and the two of `entered`


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
