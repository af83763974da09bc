"""ExecutorLink: a worker's end of the link to its executor: orders, steps, results, beats. `process.run` owns it.

A thread of its own holds the connection; losing it ends the process, as nobody is there to work for. Needs no torch.
"""

from __future__ import annotations

import os
import queue
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from shoal.distributed.message_ring import RingReader, RingWriter
from shoal.errors import EngineDeadError, StartupError
from shoal.log import get_logger
from shoal.messages import (
    AllocateCache,
    ExecutorBeat,
    StartupProgress,
    StepMessage,
    StopWorker,
    WorkerBeat,
    WorkerFailed,
    WorkerMessage,
    WorkerOrder,
    WorkerProgress,
    WorkerSetup,
)
from shoal.network.curve import present_token

logger = get_logger(__name__)
Order = TypeVar("Order", WorkerSetup, AllocateCache)

STEP_NUMBER = struct.Struct("<Q")  # before every step message: how many came before it
BEAT_SECONDS = 0.5
_SILENCE_SECONDS = 20.0
_NUM_REFUSALS = 3
_LAST_WORDS_SECONDS = 2.0
_PARTING_SECONDS = 5.0
_PROGRESS_SECONDS = 0.1
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_EVENTS = _REFUSED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


def identity(generation: int, rank: int, channel: str) -> bytes:
    """How the hub tells connections apart: nobody of another generation is taken for a worker of this one."""
    return f"{generation}/{rank}/{channel}".encode()


class ExecutorLink:
    """`send` is for any thread; steps are for one thread, results for one."""

    def __init__(self, endpoint: str, rank: int, generation: int, token: str) -> None:
        self.rank = rank
        self.endpoint = endpoint
        self._generation, self._token = generation, token
        self._context = zmq.Context()
        self._encoder = msgspec.msgpack.Encoder()
        self._step_decoder = msgspec.msgpack.Decoder(StepMessage)
        self._order_decoder = msgspec.msgpack.Decoder(WorkerOrder)
        self._orders: queue.SimpleQueue[WorkerOrder] = queue.SimpleQueue()
        self._outgoing: deque[bytes] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ending = False
        self._num_refusals = 0
        self._connected = False
        self._read_status: Callable[[], bytes] = bytes
        self._new_monitors: queue.SimpleQueue[zmq.Socket[bytes]] = queue.SimpleQueue()
        self._control = self._connect(endpoint, "control")
        self._ring: RingReader | None = None
        self._steps: zmq.Socket[bytes] | None = None
        self._num_steps = 0
        self._results_ring: RingWriter | None = None
        self._results: zmq.Socket[bytes] | None = None
        self._last_progress = ("", 0.0)
        self._thread = threading.Thread(target=self._run, name="executor-link", daemon=True)
        self._thread.start()

    def _connect(self, endpoint: str, channel: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.set_hwm(0)
        socket.linger = int(_LAST_WORDS_SECONDS * 1000)
        socket.identity = identity(self._generation, self.rank, channel)
        present_token(socket, self._token)
        socket.ipv6 = "[" in endpoint
        self._new_monitors.put(socket.get_monitor_socket(_EVENTS))
        socket.connect(endpoint)
        return socket

    # --- orders and reports ------------------------------------------------------------------------------------

    def send(self, message: WorkerMessage) -> None:
        """Over the connection that the link's thread holds; returns at once."""
        self._outgoing.append(self._encoder.encode(message))
        os.eventfd_write(self._wake, 1)

    def wait_for(self, kind: type[Order]) -> Order:
        """The next order, which must be of this kind."""
        order = self._orders.get()
        assert isinstance(order, kind), f"the executor ordered {type(order).__name__} in place of {kind.__name__}"
        return order

    def report(self, progress: StartupProgress) -> None:
        """Pass progress on, but not every little bit of it."""
        phase, then = self._last_progress
        if progress.phase != phase or progress.done >= progress.total or time.monotonic() - then >= _PROGRESS_SECONDS:
            self._last_progress = progress.phase, time.monotonic()
            self.send(WorkerProgress(self.rank, progress.phase, progress.done, progress.total))

    def fail(self, kind: str, message: str) -> None:
        """Say why this rank cannot go on, and wait for the executor to end this process; it is to end by itself then.

        Were it gone sooner, the other ranks would stumble over that, and say so instead.
        """
        self.send(WorkerFailed(self.rank, kind, message))
        time.sleep(_PARTING_SECONDS)

    def show_status(self, read_status: Callable[[], bytes]) -> None:
        """From now on beats carry this rank's status record."""
        self._read_status = read_status

    # --- steps and results -------------------------------------------------------------------------------------

    def open_channels(self, setup: WorkerSetup) -> None:
        """Raises StartupError where the executor's memory cannot be opened from here."""
        try:
            if setup.ring:
                self._ring = RingReader.open(setup.ring, setup.ring_index, setup.ring_size)
            if setup.results:
                self._results_ring = RingWriter.open(setup.results, 1)
        except OSError as error:
            raise StartupError(
                f"cannot open the executor's shared memory on the same host: {error}; both must run as one user, and "
                "see each other's /proc"
            ) from error
        if not setup.ring:
            self._steps = self._connect(setup.steps, "steps")
            self._steps.send(b"")  # the hub cannot send to a connection that it has not heard of

    def next_step(self) -> StepMessage:
        """The next message to all ranks, however long that takes. Raises EngineDeadError when one is missing."""
        if self._ring is not None:
            payload = self._ring.receive()
            assert payload is not None, "nobody closes this ring"
        else:
            assert self._steps is not None, "open_channels comes first"
            payload = self._steps.recv()
        (number,) = STEP_NUMBER.unpack_from(payload)
        if number != self._num_steps:
            raise EngineDeadError(f"message {self._num_steps} of the executor is missing: {number} came in its place")
        self._num_steps += 1
        return self._step_decoder.decode(memoryview(payload)[STEP_NUMBER.size :])

    def send_result(self, message: WorkerMessage) -> None:
        """On the shortest way: StepDone and IdleDone of the output rank."""
        data = self._encoder.encode(message)
        if self._results_ring is not None:
            self._results_ring.send(data)
            return
        if self._results is None:
            self._results = self._connect(self.endpoint, "results")
        self._results.send(data)

    # --- the thread that holds the connection ------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # the executor would wait for this rank, and this rank for orders
            logger.exception("the link to the executor broke")
            self._end(f"the link to the executor at {self.endpoint} broke: {type(error).__name__}: {error}")

    def _serve(self) -> None:
        by_network = self.endpoint.startswith("tcp:")
        poller = zmq.Poller()
        poller.register(self._wake, zmq.POLLIN)
        poller.register(self._control, zmq.POLLIN)
        monitors: list[zmq.Socket[bytes]] = []
        last_heard, next_beat = time.monotonic(), 0.0
        while not (self._ending and not self._outgoing):
            while not self._new_monitors.empty():
                monitors.append(self._new_monitors.get())
                poller.register(monitors[-1], zmq.POLLIN)
            ready = dict(poller.poll(int(BEAT_SECONDS * 1000) if by_network else None))
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if self._take_orders():
                last_heard = time.monotonic()
            for monitor in monitors:
                while monitor.poll(0):
                    self._notice(recv_monitor_message(monitor)["event"])
            while self._outgoing:
                self._control.send(self._outgoing.popleft())
            now = time.monotonic()
            if by_network and now >= next_beat:
                next_beat = now + BEAT_SECONDS
                self._control.send(self._encoder.encode(WorkerBeat(self.rank, self._read_status(), now)))
            if by_network and now - last_heard > _SILENCE_SECONDS:
                self._end(self._why_silent())
        for socket in (self._control, *monitors):
            socket.close()

    def _take_orders(self) -> bool:
        """Whether there were any."""
        heard = False
        while True:
            try:
                payload = self._control.recv(zmq.NOBLOCK)
            except zmq.Again:
                return heard
            heard = True
            order = self._order_decoder.decode(payload)
            if isinstance(order, StopWorker):
                os._exit(0)
            if not isinstance(order, ExecutorBeat):
                self._orders.put(order)

    def _notice(self, event: int) -> None:
        """Refused again and again: a wrong token. Lost after it was there: what was on its way is lost with it."""
        if event & _REFUSED:
            self._num_refusals += 1
            if self._num_refusals >= _NUM_REFUSALS:
                self._end(f"the executor at {self.endpoint} refuses this worker: it has another cluster token")
        elif event & zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._connected, self._num_refusals = True, 0
        elif event & zmq.EVENT_DISCONNECTED and self._connected:
            self._end(f"the connection to the executor at {self.endpoint} is lost")

    def _why_silent(self) -> str:
        if self._connected:
            return f"nothing was heard of the executor at {self.endpoint} for {_SILENCE_SECONDS:g} s"
        return (
            f"the executor at {self.endpoint} was not reached within {_SILENCE_SECONDS:g} s: a firewall is between, or "
            "no way leads from here to that address (which SHOAL_HOST_IP or a *_SOCKET_IFNAME that is set there chose)"
        )

    def _end(self, reason: str) -> None:
        if not self._ending:
            logger.error("%s; this worker ends", reason)
            os._exit(4)

    def close(self) -> None:
        """Hand over what is still to be said, for two seconds at most. From the thread that took the steps."""
        self._ending = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(_LAST_WORDS_SECONDS)
        if not self._thread.is_alive():
            self._context.destroy(linger=int(_LAST_WORDS_SECONDS * 1000))
