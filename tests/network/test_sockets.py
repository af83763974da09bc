from __future__ import annotations

import contextlib
import os
import socket

import pytest

from shoal import network
from shoal.errors import ConfigError, StartupError


def test_listens_and_accepts():
    with (
        contextlib.closing(network.listen("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()[:2], timeout=5) as client,
    ):
        listener.setblocking(True)
        accepted, peer = listener.accept()
        accepted.close()
        assert peer == client.getsockname()


def test_a_taken_port_is_named_with_its_holder_and_a_way_out():
    with contextlib.closing(network.listen("127.0.0.1", 0)) as listener:
        port = network.port_of(listener)
        with pytest.raises(StartupError, match=rf"port {port} on 127.0.0.1 is taken.*pid {os.getpid()}.*--port"):
            network.listen("127.0.0.1", port)
        with contextlib.closing(network.listen_preferably("127.0.0.1", port)) as other:
            assert network.port_of(other) not in (0, port)


def test_the_preferred_port_is_taken_when_it_is_free():
    port = network.free_port()
    with contextlib.closing(network.listen_preferably("127.0.0.1", port)) as listener:
        assert network.port_of(listener) == port


def test_hosts_that_cannot_work():
    with pytest.raises(ConfigError, match="does not resolve"):
        network.listen("no such host", 0)
    with pytest.raises(StartupError, match="no interface of this machine"):
        network.listen("192.0.2.1", 0)  # TEST-NET-1 (RFC 5737): nobody has it


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::1", "http://[::1]:80"),
        ("::", "http://127.0.0.1:80"),
        ("node-1", "http://node-1:80"),
    ],
)
def test_url_is_one_that_a_local_client_can_use(host, url):
    assert network.format_url(host, 80) == url
