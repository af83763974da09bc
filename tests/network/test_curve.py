from __future__ import annotations

import contextlib
import socket
import threading

import pytest
import zmq

from shoal.network.curve import admit_token, present_token

TOKEN = "a-token-of-this-test"


@pytest.fixture
def context():
    context = zmq.Context()
    context.linger = 0  # sockets that are garbage by the end count too
    yield context
    context.destroy(linger=0)


@pytest.fixture
def listener(context):
    router = context.socket(zmq.ROUTER)
    admit_token(router, TOKEN)
    router.bind("tcp://127.0.0.1:*")
    return router


def port_of(listener):
    return int(listener.last_endpoint.rpartition(b":")[2])


def connect(context, listener, token=None):
    dealer = context.socket(zmq.DEALER)
    if token is not None:
        present_token(dealer, token)
    dealer.connect(f"tcp://127.0.0.1:{port_of(listener)}")
    return dealer


def test_who_knows_the_token_is_heard_and_answered(context, listener):
    dealer = connect(context, listener, TOKEN)
    dealer.send(b"hello")
    assert listener.poll(10_000)
    identity, message = listener.recv_multipart()
    listener.send_multipart([identity, message + b" back"])
    assert dealer.poll(10_000) and dealer.recv() == b"hello back"


@pytest.mark.parametrize("token", ["another-token-than-that", None])
def test_nobody_else_is(context, listener, token):
    stranger = connect(context, listener, token)
    stranger.send(b"let me in")
    friend = connect(context, listener, TOKEN)  # comes later, and is heard: the listener lives, and has heard only it
    friend.send(b"hello")
    assert listener.poll(10_000)
    assert listener.recv_multipart()[1] == b"hello"
    with contextlib.suppress(zmq.Again):
        pytest.fail(f"heard {listener.recv_multipart(zmq.NOBLOCK)}")


def test_what_passes_is_encrypted(listener, context):
    """A plain TCP relay between the two sees no word of either."""
    seen = bytearray()
    relay = socket.create_server(("127.0.0.1", 0))

    def pump(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                seen.extend(data)
                target.sendall(data)

    def serve():
        incoming, _ = relay.accept()
        outgoing = socket.create_connection(("127.0.0.1", port_of(listener)))
        threading.Thread(target=pump, args=(outgoing, incoming), daemon=True).start()
        pump(incoming, outgoing)

    threading.Thread(target=serve, daemon=True).start()
    client = context.socket(zmq.DEALER)
    present_token(client, TOKEN)
    client.connect(f"tcp://127.0.0.1:{relay.getsockname()[1]}")
    client.send(b"a secret of some length")
    assert listener.poll(10_000)
    assert listener.recv_multipart()[1] == b"a secret of some length"
    relay.close()
    assert len(seen) > 100 and b"secret" not in seen and TOKEN.encode() not in seen
