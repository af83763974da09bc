"""ZeroMQ sockets that only holders of the cluster's token can open or read: CURVE with keys made from it (RFC 26 of
ZeroMQ). The executor's hub, its workers and the agents of other nodes call it before they bind or connect."""

from __future__ import annotations

import hashlib

import zmq
from zmq.utils import z85


def admit_token(socket: zmq.Socket[bytes], token: str) -> None:
    """Make `socket` the listening end. Whoever does not know the token cannot say a word to it: a connection needs the
    server's public key, which never crosses the network in the clear."""
    public, secret = _server_keys(token)
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = public, secret


def present_token(socket: zmq.Socket[bytes], token: str) -> None:
    """Make `socket` the connecting end, with keys of its own for this connection."""
    socket.curve_serverkey = _server_keys(token)[0]
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()


def _server_keys(token: str) -> tuple[bytes, bytes]:
    """Any 32 bytes are a secret key of Curve25519."""
    secret = z85.encode(hashlib.sha256(b"shoal cluster " + token.encode()).digest())
    return zmq.curve_public(secret), secret
