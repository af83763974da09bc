"""WorkerHub: the executor's end of the links to its workers. DistributedExecutor owns one, its bring-up shares it.

Steps go to the workers of this host through a ring in shared memory, to others over ZeroMQ; everything is encoded once
and numbered, so that a worker sees when something is missing. What workers say comes out of `poll`; results of a worker
on this host come through a ring of their own.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import threading
import time
from collections import deque

import msgspec
import zmq

from shoal.distributed.message_ring import MAX_READERS, RingReader, RingWriter
from shoal.distributed.segment import host_identity
from shoal.distributed.signals import supported
from shoal.errors import EngineDeadError
from shoal.log import get_logger
from shoal.messages import (
    ExecutorBeat,
    StepMessage,
    StopWorker,
    WorkerExited,
    WorkerHello,
    WorkerMessage,
    WorkerOrder,
)
from shoal.network.curve import admit_token
from shoal.worker.link import BEAT_SECONDS, STEP_NUMBER, identity

logger = get_logger(__name__)


class WorkerHub:
    """`poll`, `order` and `close` are for one thread at a time; `send_step` and `report_exit` for any."""

    def __init__(self, generation: int, world_size: int, address: str | None, token: str | None) -> None:
        """address: of this host, to listen on; None: all workers are children on this host, which need no network.

        token: opens the connections; None: one is made, for children to be told.
        """
        assert address is None or token is not None, "workers of other hosts could not know the token"
        self.token = token or secrets.token_hex(32)
        self._generation = generation
        self.world_size = world_size
        self.host_identity = host_identity()
        # Children on this host end with this process, and it sees them end: only a network needs beats.
        self.beats = address is not None
        self._last_heard: dict[int, float] = {}
        self._next_beat = time.monotonic()
        self._context = zmq.Context()
        self._control, self.endpoint = self._listen("control", address)
        self._steps, self.steps_endpoint = self._listen("steps", address)
        self._wake: int | None = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._control, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)
        self._exits: deque[WorkerExited] = deque()
        self._exit_lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(WorkerMessage)
        self._send_lock = threading.Lock()
        self._num_sent = 0
        self.ring: RingWriter | None = None
        self.results: RingReader | None = None
        self.ring_ranks: list[int] = []
        self._remote_ranks: list[int] = []
        self.unconnected: set[int] = set()  # those of them whose connection for steps has not come
        self._closed = False

    def _listen(self, name: str, address: str | None) -> tuple[zmq.Socket[bytes], str]:
        socket = self._context.socket(zmq.ROUTER)
        socket.set_hwm(0)  # what is queued is bounded by the steps in flight; nothing is dropped here
        socket.linger = 0
        socket.router_mandatory = True
        admit_token(socket, self.token)
        if address is None:
            # A name outside the file system: nothing is left of it, whatever ends this process.
            socket.bind(f"ipc://@shoal-workers-{secrets.token_hex(8)}-{name}")
        else:
            socket.ipv6 = ":" in address
            socket.bind(f"tcp://[{address}]:*" if ":" in address else f"tcp://{address}:*")
        return socket, str(socket.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0")

    # --- what workers say --------------------------------------------------------------------------------------

    def poll(self, seconds: float) -> list[WorkerMessage]:
        """What has come, after waiting for something for so long. Raises EngineDeadError for what is no message."""
        if self.beats:
            seconds = min(seconds, BEAT_SECONDS)
        ready = dict(self._poller.poll(milliseconds(seconds)))
        if self._wake is not None and self._wake in ready:
            os.eventfd_read(self._wake)
        messages: list[WorkerMessage] = []
        with contextlib.suppress(zmq.Again):
            while True:
                sender, *rest = self._control.recv_multipart(zmq.NOBLOCK)
                messages += self._take(sender.decode(), rest[-1])
        if self.unconnected:
            self._take_connections()
        while self._exits:
            messages.append(self._exits.popleft())
        if self.beats and time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + BEAT_SECONDS
            self.order_all(ExecutorBeat())
        return messages

    def _take(self, sender: str, payload: bytes) -> list[WorkerMessage]:
        generation, _, name = sender.partition("/")
        if generation != str(self._generation):
            return []  # of an engine that is no more: its worker hears nothing, and ends
        rank = name.partition("/")[0]
        if rank.isdecimal():
            self._last_heard[int(rank)] = time.monotonic()
        if not payload:
            return []
        try:
            return [self._decoder.decode(payload)]
        except msgspec.MsgspecError as error:
            raise EngineDeadError(f"what worker {name} sends is no message of this version: {error}") from error

    def _take_connections(self) -> None:
        """Workers of other hosts say a word on the socket for steps, so that it knows where they are."""
        with contextlib.suppress(zmq.Again):
            while True:
                sender = self._steps.recv_multipart(zmq.NOBLOCK)[0]
                self.unconnected = {
                    rank for rank in self.unconnected if identity(self._generation, rank, "steps") != sender
                }
        if not self.unconnected:
            self._poller.unregister(self._steps)  # from now on it is for `send_step` alone, in whatever thread

    def report_exit(self, rank: int, how: str) -> None:
        """A worker's process has ended; comes out of `poll`. From any thread, also when it is too late."""
        with self._exit_lock:
            if self._wake is not None:
                self._exits.append(WorkerExited(rank, how))
                os.eventfd_write(self._wake, 1)

    def unheard(self, seconds: float) -> dict[int, float]:
        """Ranks that said something once, and nothing for so long: for how long. None where no network is between."""
        if not self.beats:
            return {}
        now = time.monotonic()
        return {rank: now - then for rank, then in self._last_heard.items() if now - then >= seconds}

    # --- what workers are told ---------------------------------------------------------------------------------

    def order(self, rank: int, order: WorkerOrder) -> bool:
        """Tell one worker something outside the steps; False where it is not connected any more."""
        try:
            target = identity(self._generation, rank, "control")
            self._control.send_multipart([target, self._encoder.encode(order)], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def order_all(self, order: WorkerOrder) -> None:
        """Tell all workers that have come."""
        for rank in range(self.world_size):
            self.order(rank, order)

    def open_channels(self, hellos: dict[int, WorkerHello], output_rank: int) -> None:
        """Once all have come: make the rings for those who share this host's memory."""
        here = [rank for rank, hello in sorted(hellos.items()) if hello.host_identity == self.host_identity]
        if supported() and 0 < len(here) <= MAX_READERS:
            self.ring_ranks = here
            self.ring = RingWriter.create(len(here))
            if output_rank in here:
                self.results = RingReader.create()
        self._remote_ranks = [rank for rank in sorted(hellos) if rank not in self.ring_ranks]
        self.unconnected = set(self._remote_ranks)
        if self.unconnected:
            self._poller.register(self._steps, zmq.POLLIN)

    def release_rings(self) -> None:
        """All workers of this host have opened them: let nobody else in any more."""
        for ring in (self.ring, self.results):
            if ring is not None:
                ring.release()

    def send_step(self, message: StepMessage) -> None:
        """To all ranks, after all that was sent before. Waits while a worker of this host is behind by a whole ring.

        Raises EngineDeadError where a connection is gone, or the hub was told to stop.
        """
        body = self._encoder.encode(message)
        with self._send_lock:
            if self._closed:
                raise EngineDeadError("the engine has ended")
            payload = STEP_NUMBER.pack(self._num_sent) + body
            self._num_sent += 1
            # The network takes longest, so it comes first.
            for rank in self._remote_ranks:
                try:
                    self._steps.send_multipart([identity(self._generation, rank, "steps"), payload], zmq.NOBLOCK)
                except zmq.ZMQError as error:
                    raise EngineDeadError(f"the connection to rank {rank} is gone ({error})") from error
            if self.ring is not None:
                try:
                    self.ring.send(payload)
                except BrokenPipeError as error:
                    raise EngineDeadError("the engine has ended") from error

    # --- the end -----------------------------------------------------------------------------------------------

    def stop_channels(self) -> None:
        """No step is sent any more; whoever waits for room, or for a result, returns. From any thread."""
        for ring in (self.ring, self.results):
            if ring is not None:
                ring.close()

    def stop_workers(self) -> None:
        """Tell the workers to end where they are: for those who cannot come to the end of their steps."""
        self.order_all(StopWorker())

    def close(self) -> None:
        """Give back sockets and files. When no other thread is at work here."""
        self.stop_channels()
        with self._send_lock:
            if self._closed:
                return
            self._closed = True
        self._context.destroy(linger=200)
        self.release_rings()
        with self._exit_lock:
            if self._wake is not None:
                os.close(self._wake)
                self._wake = None


def milliseconds(seconds: float) -> int:
    """For ZeroMQ: rounded up, so that what waits for a moment does not come too early again and again."""
    return max(math.ceil(seconds * 1000), 0)
