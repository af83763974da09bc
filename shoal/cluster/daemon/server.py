"""The daemon's TCP side: takes questions of those who know the cluster's token, and lets services answer them.

One thread owns the socket; slow services run in a pool beside it, as many at once as it has threads.
"""

from __future__ import annotations

import collections
import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import zmq

from shoal import network
from shoal.cluster.daemon.wire import HANDSHAKE_SECONDS, MAX_BYTES, WIRE_VERSION, NodeView, Reply, Request, Service
from shoal.errors import ShoalError, StartupError
from shoal.log import get_logger
from shoal.version import __version__

_NUM_THREADS = 16
_POLL_MILLISECONDS = 1000
_SEGMENT_BYTES = 1200
_EMPTY = msgspec.Raw(msgspec.msgpack.encode(None))

logger = get_logger(__name__)


class Server:
    """Listens on `address`:`port` from `start` until `stop`."""

    def __init__(self, node: NodeView, services: Iterable[Service[Any, Any]], *, address: str, port: int) -> None:
        self._node = node
        self._services = {service.name: service for service in services}
        self._endpoint = network.format_endpoint(address, port)
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="service")
        self._answers: collections.deque[tuple[bytes, bytes]] = collections.deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="daemon-server", daemon=True)

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        """Raises StartupError when the port is taken."""
        host, port = network.split_endpoint(self._endpoint)
        # ZeroMQ does not say who holds a port.
        listener = network.listen(host, port, way_out="it is one of the node's ports: see docs/ports.md")
        # Both ends then send small packets, so that nodes understand each other where large ones are lost on the way.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT_BYTES)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.ipv6 = "[" in self._endpoint
        self._socket.maxmsgsize = MAX_BYTES
        self._socket.handshake_ivl = int(1000 * HANDSHAKE_SECONDS)
        network.admit_token(self._socket, self._node.token)
        self._socket.setsockopt(zmq.USE_FD, listener.detach())
        try:
            self._socket.bind(f"tcp://{self._endpoint}")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise StartupError(f"cannot listen on {self._endpoint}: {error}") from error
        self._thread.start()

    def stop(self) -> None:
        """Take no more questions; those that run are not waited for."""
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        while not self._stopping.is_set():
            ready = dict(poller.poll(_POLL_MILLISECONDS))
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if self._socket in ready:
                with contextlib.suppress(zmq.Again):
                    while True:
                        identity, *rest = self._socket.recv_multipart(zmq.NOBLOCK)
                        if len(rest) == 1:
                            self._take(identity, rest[0])
            while self._answers:
                with contextlib.suppress(zmq.ZMQError):  # whoever asked has gone
                    self._socket.send_multipart(self._answers.popleft(), zmq.NOBLOCK)
        self._context.destroy(linger=0)

    def _take(self, identity: bytes, data: bytes) -> None:
        try:
            request = msgspec.msgpack.decode(data, type=Request)
        except msgspec.MsgspecError:
            reply = self._refusal(0, "this is no question that it understands")
            self._answers.append((identity, msgspec.msgpack.encode(reply)))
            return
        service = self._services.get(request.service)
        if request.wire_version != WIRE_VERSION or service is None:
            reply = self._refusal(request.number, f"it has no service {request.service}")
            self._answers.append((identity, msgspec.msgpack.encode(reply)))
        elif service.is_slow:
            self._pool.submit(self._answer, identity, request, service, time.monotonic())
        else:
            self._answer(identity, request, service, time.monotonic())

    def _answer(self, identity: bytes, request: Request, service: Service[Any, Any], came_at: float) -> None:
        if time.monotonic() - came_at > request.timeout:
            return  # nobody waits for it any more
        try:
            body = msgspec.msgpack.decode(request.body, type=service.request)
            response = msgspec.Raw(msgspec.msgpack.encode(service.run(self._node, body)))
            reply = Reply(WIRE_VERSION, __version__, request.number, "", response)
        except msgspec.MsgspecError as error:
            reply = self._refusal(request.number, f"the question {service.name} does not fit: {error}")
        except ShoalError as error:
            reply = Reply(WIRE_VERSION, __version__, request.number, str(error), _EMPTY)
        except Exception as error:  # a bug in a service ends that answer, not the daemon
            logger.exception("the service %s failed", service.name)
            text = f"{service.name} failed on {self._node.address}: {type(error).__name__}: {error}"
            reply = Reply(WIRE_VERSION, __version__, request.number, text, _EMPTY)
        self._answers.append((identity, msgspec.msgpack.encode(reply)))
        os.eventfd_write(self._wake, 1)

    def _refusal(self, number: int, what: str) -> Reply:
        text = f"the daemon of {self._node.address} is of Shoal {__version__} (wire {WIRE_VERSION}): {what}"
        return Reply(WIRE_VERSION, __version__, number, text, _EMPTY)
