"""Asking node daemons: one, or many at once. Commands and services call it; no answer is an error that says why."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from shoal import network
from shoal.cluster.daemon.wire import (
    HANDSHAKE_SECONDS,
    MAX_BYTES,
    WIRE_VERSION,
    Reply,
    Request,
    RequestType,
    ResponseType,
    Service,
)
from shoal.errors import NodeError, ShoalError
from shoal.version import __version__

CONNECT_SECONDS = 5.0
# ZeroMQ tries for ever; packets that are lost must not make it wait for TCP's next try.
_RECONNECT_MILLISECONDS = 2000
# Who takes no token ends the connection at once. After longer than this it is the daemon's patience with a connection
# on which nothing comes (packets are lost), and ZeroMQ opens another.
_REFUSAL_SECONDS = 0.8 * HANDSHAKE_SECONDS
_NUM_THREADS = 64
_REFUSED_EVENTS = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_EVENTS = _REFUSED_EVENTS | zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
_numbers = itertools.count(1)


def ask(
    endpoint: str,
    token: str,
    service: Service[RequestType, ResponseType],
    request: RequestType,
    *,
    timeout: float = 10.0,
    bind: str | None = None,
) -> ResponseType:
    """What the daemon at HOST:PORT answers. timeout: seconds in all. bind: the address of this machine to ask from.

    Raises NodeError, whose `reason` tells what kind it is: "refused" (nobody listens there), "dropped" (no answer to a
    connection: a firewall, or nobody has the address), "unreachable" (no route), "token", "version", "silent"
    (connected, but no answer in time) or "failed" (the service raised, and this is its text).
    """
    deadline = time.monotonic() + timeout
    host, port = network.split_endpoint(endpoint)
    endpoint = network.format_endpoint(network.resolve_head(host), port)
    _check_reachable(endpoint, min(CONNECT_SECONDS, timeout), bind)
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.maxmsgsize = MAX_BYTES
        dealer.ipv6 = "[" in endpoint
        dealer.connect_timeout = _RECONNECT_MILLISECONDS
        network.present_token(dealer, token)
        with dealer.get_monitor_socket(_EVENTS) as monitor:
            source = f"{network.format_endpoint(bind, 0)};" if bind is not None else ""
            dealer.connect(f"tcp://{source}{endpoint}")
            number = next(_numbers)
            body = msgspec.Raw(msgspec.msgpack.encode(request))
            wait = max(deadline - time.monotonic(), 0.0)
            envelope = Request(WIRE_VERSION, __version__, number, service.name, wait, body)
            dealer.send(msgspec.msgpack.encode(envelope))
            try:
                answer = _receive(dealer, monitor, endpoint, service.name, deadline)
            finally:
                dealer.disable_monitor()
    return _open(answer, endpoint, service)


def ask_all(
    endpoints: Iterable[str],
    token: str,
    service: Service[RequestType, ResponseType],
    request: RequestType,
    *,
    timeout: float = 10.0,
) -> dict[str, ResponseType | ShoalError]:
    """All at once; by endpoint, what each answers, or the error that `ask` raised. In the given order."""
    return ask_each({endpoint: request for endpoint in endpoints}, token, service, timeout=timeout)


def ask_each(
    requests: Mapping[str, RequestType],
    token: str,
    service: Service[RequestType, ResponseType],
    *,
    timeout: float = 10.0,
) -> dict[str, ResponseType | ShoalError]:
    """As `ask_all`, with a question of its own for each endpoint."""

    def ask_one(endpoint: str) -> ResponseType | ShoalError:
        try:
            return ask(endpoint, token, service, requests[endpoint], timeout=timeout)
        except ShoalError as error:
            return error

    if not requests:
        return {}
    with ThreadPoolExecutor(min(len(requests), _NUM_THREADS), thread_name_prefix="ask") as pool:
        return dict(zip(requests, pool.map(ask_one, requests), strict=True))


def _check_reachable(endpoint: str, timeout: float, bind: str | None) -> None:
    """A plain connection first: ZeroMQ tries for ever, and does not tell a refusal from a dropped packet."""
    host, port = network.split_endpoint(endpoint)
    try:
        network.connect(host, port, timeout=timeout, bind=bind).close()
    except ConnectionRefusedError as error:
        raise NodeError(
            f"nothing listens at {endpoint}: no node daemon runs there (`shoal node start` starts it)", reason="refused"
        ) from error
    except TimeoutError as error:
        raise NodeError(
            f"{endpoint} did not answer within {timeout:g} s: the machine is down or cut off, or a firewall drops what "
            f"comes to port {port}",
            reason="dropped",
        ) from error
    except OSError as error:
        raise NodeError(f"cannot reach {endpoint}: {error.strerror or error}", reason="unreachable") from error


def _receive(
    dealer: zmq.Socket[bytes], monitor: zmq.Socket[bytes], endpoint: str, service: str, deadline: float
) -> bytes:
    poller = zmq.Poller()
    poller.register(dealer, zmq.POLLIN)
    poller.register(monitor, zmq.POLLIN)
    is_admitted, was_ended, connected_at = False, False, 0.0
    while (left := deadline - time.monotonic()) > 0:
        ready = dict(poller.poll(max(int(left * 1000), 1)))
        if dealer in ready:
            return dealer.recv()
        if monitor not in ready:
            continue
        event = int(recv_monitor_message(monitor)["event"])
        if event & zmq.EVENT_CONNECTED:
            connected_at = time.monotonic()
        is_admitted = is_admitted or bool(event & zmq.EVENT_HANDSHAKE_SUCCEEDED)
        if event & zmq.EVENT_DISCONNECTED and is_admitted:
            raise NodeError(f"the daemon at {endpoint} ended while it was asked for {service}", reason="silent")
        was_ended = was_ended or bool(event & zmq.EVENT_DISCONNECTED)
        is_early = time.monotonic() - connected_at < _REFUSAL_SECONDS
        if event & _REFUSED_EVENTS or (event & zmq.EVENT_DISCONNECTED and is_early):
            raise NodeError(
                f"{endpoint} does not take the cluster token given here: it must be the same on all nodes "
                "(SHOAL_CLUSTER_TOKEN, --token-file, or ~/.shoal/cluster-token). Or something else listens there",
                reason="token",
            )
    text = f"the daemon at {endpoint} did not answer {service} in time"
    if not is_admitted:
        text = (
            f"{endpoint} takes connections, but no daemon answers: another program listens there, or packets are lost"
        )
        text += ", or it does not take the cluster token given here" if was_ended else ""
    raise NodeError(text, reason="silent")


def _open(data: bytes, endpoint: str, service: Service[RequestType, ResponseType]) -> ResponseType:
    """The response in a reply's envelope."""
    theirs = "another version"
    with contextlib.suppress(msgspec.MsgspecError):
        head = msgspec.msgpack.decode(data)
        if isinstance(head, list) and len(head) > 1:
            theirs = f"{head[1]} (wire {head[0]})"
    differs = f"the daemon at {endpoint} is of Shoal {theirs}, this is {__version__} (wire {WIRE_VERSION})"
    try:
        reply = msgspec.msgpack.decode(data, type=Reply)
        if reply.wire_version != WIRE_VERSION:
            raise NodeError(f"{differs}; every node must have the same", reason="version")
        if reply.error:
            raise NodeError(reply.error, reason="failed" if reply.shoal_version == __version__ else "version")
        return msgspec.msgpack.decode(reply.body, type=service.response)
    except msgspec.MsgspecError as error:
        raise NodeError(
            f"{differs}, and its answer to {service.name} does not fit: {error}", reason="version"
        ) from error
