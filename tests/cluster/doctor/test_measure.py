"""A responder and who measures, both on the loopback."""

from __future__ import annotations

import socket
import time

import pytest

from shoal.cluster.doctor.measure import measure_link
from shoal.cluster.doctor.responder import ASK_COUNT, COUNT, HEAD, PING, Responder, receive
from shoal.errors import StartupError
from shoal.network import free_port

HERE = "127.0.0.1"


@pytest.fixture
def responder():
    with Responder(HERE, lifetime=30.0) as responder:
        yield responder


def test_the_loopback_is_fast_and_loses_nothing(responder):
    facts = measure_link(HERE, HERE, responder.port, responder.nonce, seconds=0.3)
    assert facts.error == "" and 0 < facts.round_trip_seconds < 0.5
    assert facts.num_sent == facts.num_arrived == facts.num_answered > 0
    assert facts.mtu == facts.largest_packet > 10000
    assert facts.bandwidth_bytes_per_s > 1e7


def test_the_round_trip_alone(responder):
    facts = measure_link(HERE, HERE, responder.port, responder.nonce, seconds=0)
    assert facts.round_trip_seconds > 0 and facts.num_sent == 0 and facts.bandwidth_bytes_per_s == 0


def test_who_does_not_know_the_nonce_learns_nothing(responder):
    facts = measure_link(HERE, HERE, responder.port, bytes(16), seconds=0.1)
    assert facts.error and facts.bandwidth_bytes_per_s == 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.settimeout(0.3)
        stranger.sendto(HEAD.pack(bytes(16), 1, 1), (HERE, responder.port))
        stranger.sendto(b"short", (HERE, responder.port))
        with pytest.raises(TimeoutError):
            stranger.recv(100)


def test_datagrams_are_counted_once(responder):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.settimeout(5)
        for number in (1, 2, 2, 2, 3):
            sender.sendto(HEAD.pack(responder.nonce, 7, number) + bytes(1000), (HERE, responder.port))
            assert sender.recv(2000) == HEAD.pack(responder.nonce, 7, number)
    with socket.create_connection((HERE, responder.port), timeout=5) as asking:
        asking.sendall(responder.nonce + ASK_COUNT + COUNT.pack(7))
        assert COUNT.unpack(receive(asking, COUNT.size)) == (3,)


def test_nobody_listens():
    facts = measure_link(HERE, HERE, free_port(), bytes(16), seconds=0.1)
    assert "refuses connections" in facts.error


def test_a_listener_that_never_answers_does_not_hold_anybody():
    with socket.create_server((HERE, 0)) as mute:
        start = time.monotonic()
        facts = measure_link(HERE, HERE, mute.getsockname()[1], bytes(16), seconds=0.1)
    assert facts.error and time.monotonic() - start < 15


def test_it_ends_with_its_lifetime_and_takes_other_ports_where_they_are_free():
    with socket.create_server((HERE, 0)) as holder:
        taken, free = holder.getsockname()[1], free_port()
        responder = Responder(HERE, lifetime=0.3, tcp=[taken, free])
        assert responder.open_tcp == [free]
    deadline = time.monotonic() + 10
    while responder.is_open:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(OSError):
        socket.create_connection((HERE, responder.port), timeout=1)
    responder.close()
    with pytest.raises(StartupError):
        Responder("192.0.2.77", lifetime=1)


def test_many_at_once(responder):
    """More connections than it serves: those beyond are closed, and it goes on."""
    idle = [socket.create_connection((HERE, responder.port), timeout=5) for _ in range(40)]
    for connection in idle:
        connection.close()
    deadline = time.monotonic() + 10
    while True:
        with socket.create_connection((HERE, responder.port), timeout=5) as asking:
            asking.sendall(responder.nonce + PING + b"p")
            try:
                assert receive(asking, 1) == b"p"
                return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
