"""Questions to a daemon over real sockets: answers, and each way in which there is none."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from shoal import network
from shoal.cluster.daemon import client
from shoal.cluster.daemon.client import ask, ask_all, ask_each
from shoal.cluster.daemon.node_services import PEERS, PING, Pong
from shoal.cluster.daemon.reports import NodeReport, PeerReport
from shoal.cluster.daemon.server import Server
from shoal.cluster.daemon.services import SERVICES
from shoal.cluster.daemon.wire import HANDSHAKE_SECONDS, WIRE_VERSION, Nothing, Reply, Request, Service
from shoal.errors import NodeError, StartupError
from shoal.executor.ray_head import Answer
from shoal.version import __version__
from tests.namespaces import connected_hosts

TOKEN = "a-token-of-this-test"


class Number(msgspec.Struct):
    value: int


def _double(node: object, request: Number) -> Number:
    if request.value < 0:
        raise StartupError(f"{request.value} cannot be doubled here")
    return Number(2 * request.value)


def _break(node: object, request: Nothing) -> Nothing:
    raise KeyError("a bug")


def _sleep(node: object, request: Number) -> Number:
    time.sleep(request.value)
    return request


DOUBLE = Service("double", Number, Number, _double)
BREAK = Service("break", Nothing, Nothing, _break, is_slow=False)
SLEEP = Service("sleep", Number, Number, _sleep)
UNKNOWN = Service("unknown", Nothing, Nothing, _break)


class FakeNode:
    address = "127.0.0.1"
    head = "127.0.0.1:6379"
    is_head = True
    daemon_port = 0
    token = TOKEN

    def peers(self) -> list[PeerReport]:
        return []

    def report(self) -> NodeReport:
        raise NotImplementedError

    def ray_nodes(self) -> Answer:
        raise NotImplementedError


@pytest.fixture
def endpoint() -> Iterator[str]:
    port = network.free_port()
    server = Server(FakeNode(), (*SERVICES, DOUBLE, BREAK, SLEEP), address="127.0.0.1", port=port)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop()


def reason_of(endpoint, token=TOKEN, service=PING, request=None, timeout=5.0) -> tuple[str, str]:
    with pytest.raises(NodeError) as caught:
        ask(endpoint, token, service, request or Nothing(), timeout=timeout)
    return caught.value.reason, str(caught.value)


def test_a_question_gets_its_answer(endpoint):
    pong = ask(endpoint, TOKEN, PING, Nothing())
    assert isinstance(pong, Pong) and pong.address == "127.0.0.1" and pong.shoal_version == __version__
    assert ask(endpoint, TOKEN, PEERS, Nothing()).peers == []
    assert ask(endpoint, TOKEN, DOUBLE, Number(21)).value == 42


def test_what_a_service_raises_is_raised_where_it_was_asked(endpoint):
    assert reason_of(endpoint, service=DOUBLE, request=Number(-1)) == ("failed", "-1 cannot be doubled here")
    reason, text = reason_of(endpoint, service=BREAK)
    assert reason == "failed" and "break failed on 127.0.0.1: KeyError: 'a bug'" in text
    assert ask(endpoint, TOKEN, PING, Nothing()).address == "127.0.0.1"  # it lives on


def test_slow_services_hold_up_nobody(endpoint):
    began = time.monotonic()
    answers = ask_each({endpoint: Number(1)}, TOKEN, SLEEP)
    slow = threading.Thread(target=ask, args=(endpoint, TOKEN, SLEEP, Number(1)))
    slow.start()
    ask(endpoint, TOKEN, PING, Nothing())
    slow.join()
    assert answers == {endpoint: Number(1)}
    assert reason_of(endpoint, service=SLEEP, request=Number(3), timeout=0.5)[0] == "silent"
    assert time.monotonic() - began < 20


def test_why_there_is_no_answer(endpoint):
    reason, text = reason_of(endpoint, token="another-token-than-that")
    assert reason == "token" and "the same on all nodes" in text
    reason, text = reason_of(f"127.0.0.1:{network.free_port()}")
    assert reason == "refused" and "no node daemon runs there" in text
    reason, text = reason_of(endpoint, service=UNKNOWN)
    assert reason == "failed" and "it has no service unknown" in text
    wrong = Service("double", Nothing, Number, _double)
    assert "does not fit" in reason_of(endpoint, service=wrong)[1]
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert reason_of(f"127.0.0.1:{mute.getsockname()[1]}", timeout=1.0)[0] == "silent"


def test_a_connection_on_which_nothing_comes_is_no_refused_token():
    """As where packets are lost: the other end has enough of it after some seconds, and the next one is opened."""

    def take() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                threading.Timer(HANDSHAKE_SECONDS, connection.close).start()

    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=take)
    thread.start()
    try:
        reason, text = reason_of(f"127.0.0.1:{listener.getsockname()[1]}", timeout=HANDSHAKE_SECONDS + 1)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
    assert reason == "silent" and "packets are lost" in text


def test_a_daemon_of_another_version_is_named():
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    network.admit_token(router, TOKEN)
    router.bind("tcp://127.0.0.1:*")
    endpoint = router.last_endpoint.decode().removeprefix("tcp://")

    def answer() -> None:
        for reply in (
            Reply(WIRE_VERSION + 1, "9.9", 1, "", msgspec.Raw(b"\xc0")),
            Reply(WIRE_VERSION, "9.9", 1, "", msgspec.Raw(msgspec.msgpack.encode({"other": 1}))),
        ):
            identity, data = router.recv_multipart()
            assert msgspec.msgpack.decode(data, type=Request).service == "ping"
            router.send_multipart([identity, msgspec.msgpack.encode(reply)])

    thread = threading.Thread(target=answer)
    thread.start()
    for _ in range(2):
        reason, text = reason_of(endpoint)
        assert reason == "version" and "is of Shoal 9.9" in text and __version__ in text
    thread.join()
    context.destroy(linger=0)


def test_many_are_asked_at_once(endpoint):
    nobody = f"127.0.0.1:{network.free_port()}"
    answers = ask_all([nobody, endpoint], TOKEN, PING, Nothing())
    assert list(answers) == [nobody, endpoint]
    assert isinstance(answers[nobody], NodeError) and isinstance(answers[endpoint], Pong)
    assert ask_all([], TOKEN, PING, Nothing()) == {}


def test_a_taken_port_is_an_error_that_names_who_has_it(endpoint):
    host, port = network.split_endpoint(endpoint)
    with pytest.raises(StartupError, match=f"port {port} on 127.0.0.1 is taken"):
        Server(FakeNode(), SERVICES, address=host, port=port).start()


def test_a_dropped_packet_is_told_from_a_refusal(monkeypatch):
    monkeypatch.setattr(client, "CONNECT_SECONDS", 0.5)
    with connected_hosts(2) as hosts:
        here, there = hosts.hosts
        hosts.cut(there)
        with here.entered():
            reason, text = reason_of(f"{there.address}:6380")
        assert reason in ("dropped", "unreachable") and there.address in text
