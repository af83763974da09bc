"""The agent of a node with --node-rank above 0: joins node 0, starts this node's workers, watches them, ends with them.

`shoal serve` and LLM run `work_for_node_0` there in place of a server. The other end is `node_door`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from shoal import network
from shoal.config.engine_config import EngineConfig
from shoal.errors import ConfigError, EngineDeadError, ShoalError, StartupError
from shoal.executor.launcher import Launcher, WorkerLink
from shoal.executor.multiprocess import LocalLauncher
from shoal.executor.node_door import BEAT_SECONDS, REFUSED_EVENTS, SILENCE_SECONDS
from shoal.executor.node_layout import node_facts, ranks_on
from shoal.log import get_logger
from shoal.messages import (
    ExecutorBeat,
    NodeBeat,
    NodeHello,
    NodeLeaving,
    NodeMessage,
    NodeOrder,
    NodeRefused,
    NodeStart,
    NodeStop,
    NodeStopped,
    WorkerExited,
)

logger = get_logger(__name__)

_RETRY_MILLISECONDS = 500
_CONNECT_MILLISECONDS = 3000
_REMIND_SECONDS = 10.0
# Node 0 tells the other nodes to end when a worker has ended; if it does not, this node does so by itself.
_ORDER_SECONDS = 5.0
_LAST_WORDS_MILLISECONDS = 1000
# Refused once may be a server that was just ending; refused again and again is a token that differs.
_NUM_REFUSALS = 3
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | REFUSED_EVENTS


def work_for_node_0(config: EngineConfig) -> None:
    """Run this node's workers until the engine ends, or Ctrl-C or SIGTERM ends this node.

    Raises ConfigError (no token, no such address), StartupError or EngineDeadError with the reason when it fails.
    """
    parallel = config.parallel
    replicas = [dataclasses.replace(parallel, data_rank=replica) for replica in range(parallel.data_size)]
    here = [each for each in replicas if ranks_on(each, parallel.node_rank)]
    agents = [NodeAgent(dataclasses.replace(config, parallel=each)) for each in here]
    failures: list[BaseException] = []

    def run(agent: NodeAgent) -> None:
        try:
            agent.run()
        except BaseException as error:  # raised again in the caller's thread
            logger.debug("an agent failed", exc_info=True)
            failures.append(error)

    threads = [threading.Thread(target=run, args=(agent,), name="node-agent") for agent in agents]
    with _signals_to(agents):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _signals_to(agents: list[NodeAgent]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the agents in order. Where this is not the main thread, signals are somebody else's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        for agent in agents:
            agent.leave(f"it was ended there by {signal.Signals(number).name}")

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _resolve(master: str, timeout: float) -> str:
    """The address of node 0. A name may come up with its machine only, as those of pods do, and is waited for."""
    deadline, next_reminder = time.monotonic() + timeout, 0.0
    while True:
        try:
            return network.resolve_head(master)
        except ConfigError as error:
            if not isinstance(error.__cause__, socket.gaierror) or time.monotonic() >= deadline:
                raise
            if time.monotonic() >= next_reminder:
                next_reminder = time.monotonic() + _REMIND_SECONDS
                logger.info("waiting for node 0: %s", error)
            time.sleep(1.0)


class NodeAgent:
    """This node's part of one replica. `run` works in the thread that calls it; `leave` is for any other."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises ConfigError where there is no token, or no way to node 0."""
        self._config, self._parallel = config, config.parallel
        assert self._parallel.master_address is not None, "config.resolve asks for it"
        port = self._parallel.master_port + self._parallel.data_rank
        self._token = network.load_token(self._parallel.token_file)
        master = _resolve(self._parallel.master_address, self._parallel.startup_timeout)
        self._node_0 = network.format_endpoint(master, port)
        self._address = network.host_address(master)
        self._ranks = ranks_on(self._parallel, self._parallel.node_rank)
        self._workers = self.make_workers(config, self._ranks)
        self._exits: queue.SimpleQueue[WorkerExited] = queue.SimpleQueue()
        self._leaving = ""
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(NodeOrder)

    def make_workers(self, config: EngineConfig, ranks: list[int]) -> Launcher:
        """What starts this node's ranks."""
        return LocalLauncher(config, ranks)

    def leave(self, reason: str) -> None:
        """End this node's workers, and so the engine; `run` returns then."""
        self._leaving = reason
        os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """See `work_for_node_0`."""
        self._connect()
        try:
            start = self._join()
            if start is None:
                return
            logger.info("node 0 at %s is there; starting rank %s", self._node_0, ", ".join(map(str, self._ranks)))
            self._workers.start(
                WorkerLink(
                    endpoint=start.endpoint,
                    generation=start.generation,
                    token=self._token,
                    model_path=self._config.model.path,
                ),
                self._report_exit,
            )
            self._work()
        except ShoalError as error:
            self._say_goodbye(str(error))
            raise
        finally:
            self._workers.stop(0.0)
            self._context.destroy(linger=_LAST_WORDS_MILLISECONDS)

    def _connect(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.ipv6 = "[" in self._node_0
        self._socket.reconnect_ivl = _RETRY_MILLISECONDS
        self._socket.connect_timeout = _CONNECT_MILLISECONDS
        network.present_token(self._socket, self._token)
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        self._poller = zmq.Poller()
        for source in (self._socket, self._monitor, self._wake):
            self._poller.register(source, zmq.POLLIN)
        self._socket.connect(f"tcp://{self._node_0}")

    # --- joining ---------------------------------------------------------------------------------------------------

    def _join(self) -> NodeStart | None:
        """Wait for node 0, which may be started later than this one. None when this node is to leave before."""
        parallel = self._parallel
        logger.info(
            "node %d of %d (%s on %s) joins node 0 at %s, which serves",
            *(parallel.node_rank, parallel.num_nodes, self._address, network.interface_of(self._address), self._node_0),
        )
        hello = NodeHello(
            node_rank=parallel.node_rank,
            hostname=socket.gethostname(),
            address=self._address,
            pid=os.getpid(),
            facts=node_facts(self._config),
        )
        began = time.monotonic()
        deadline, next_reminder, num_refusals = began + parallel.startup_timeout, began + 1.0, 0
        while time.monotonic() < deadline:
            for event in self._wait():
                if event & zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self._send(hello)
                    num_refusals = 0
                num_refusals += bool(event & REFUSED_EVENTS)
            if num_refusals >= _NUM_REFUSALS:
                raise ConfigError(
                    f"{self._node_0} does not take this node's cluster token: it must be the same on all nodes "
                    "(SHOAL_CLUSTER_TOKEN, --token-file, or ~/.shoal/cluster-token). Or something else listens there"
                )
            if self._leaving:
                return None
            for order in self._orders():
                match order:
                    case NodeStart():
                        return order
                    case NodeRefused(reason):
                        raise StartupError(f"node 0 at {self._node_0} refused this node: {reason}")
                    case NodeStop(_, reason):
                        raise StartupError(f"node 0 at {self._node_0} is ending{f': {reason}' if reason else ''}")
            if time.monotonic() >= next_reminder:
                next_reminder = time.monotonic() + _REMIND_SECONDS
                logger.info("waiting for node 0 at %s", self._node_0)
        raise StartupError(
            f"node 0 did not answer at {self._node_0} within {parallel.startup_timeout:g} s (--startup-timeout); the "
            "same command must run on the machine with that address (--master-addr) with --node-rank 0, and the port "
            f"be open to this one, {self._address} on {network.interface_of(self._address)}"
        )

    # --- working ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Until the engine ends, in order or not, or this node leaves."""
        last_heard, next_beat = time.monotonic(), 0.0
        death, end_at = "", float("inf")
        while True:
            lost = any(event & zmq.EVENT_DISCONNECTED for event in self._wait())
            for order in self._orders():
                last_heard = time.monotonic()
                match order:
                    case NodeStop(grace_seconds, reason):
                        self._end(grace_seconds)
                        if reason:
                            raise EngineDeadError(f"the engine ended: {reason}")
                        logger.info("the engine has ended")
                        return
                    case NodeRefused(reason):
                        raise EngineDeadError(f"node 0 at {self._node_0} knows this node no more: {reason}")
                    case NodeStart() | ExecutorBeat():
                        pass
            now = time.monotonic()
            while not self._exits.empty():
                exited = self._exits.get()
                # In order only node 0 knows: workers that it told to end are often gone before it tells this agent.
                logger.info("%s %s", self._workers.describe(exited.rank), exited.how)
                self._send(exited)
                death, end_at = death or f"rank {exited.rank} {exited.how}", min(end_at, now + _ORDER_SECONDS)
            if self._leaving:
                logger.info("leaving: the workers of this node end, and so does the engine")
                self._say_goodbye(self._leaving)
                return
            if now > end_at:
                raise EngineDeadError(death)
            if lost:
                raise EngineDeadError(f"the connection to node 0 at {self._node_0} was closed: its engine has ended")
            if now - last_heard > SILENCE_SECONDS:
                raise EngineDeadError(
                    f"nothing was heard of node 0 at {self._node_0} for {now - last_heard:.0f} s; it is down or cut off"
                )
            if now >= next_beat:
                next_beat = now + BEAT_SECONDS
                self._send(NodeBeat())

    def _report_exit(self, rank: int, how: str) -> None:
        self._exits.put(WorkerExited(rank, how))
        os.eventfd_write(self._wake, 1)

    def _end(self, grace_seconds: float) -> None:
        self._workers.stop(grace_seconds)
        self._send(NodeStopped())

    def _say_goodbye(self, reason: str) -> None:
        """This node ends by itself: node 0 is told, if it is there."""
        self._send(NodeLeaving(reason))
        self._end(0.0)

    # --- the connection --------------------------------------------------------------------------------------------

    def _wait(self) -> list[int]:
        """Until something comes, or it is time for a beat. Returns what has happened to the connection."""
        ready = dict(self._poller.poll(int(BEAT_SECONDS * 1000)))
        if self._wake in ready:
            os.eventfd_read(self._wake)
        events = []
        while self._monitor.poll(0):
            events.append(int(recv_monitor_message(self._monitor)["event"]))
        return events

    def _orders(self) -> Iterator[NodeOrder]:
        with contextlib.suppress(zmq.Again):
            while True:
                data = self._socket.recv(zmq.NOBLOCK)
                try:
                    yield self._decoder.decode(data)
                except msgspec.MsgspecError as error:
                    raise StartupError(
                        f"what node 0 at {self._node_0} says is no message of this version of Shoal: {error}"
                    ) from error

    def _send(self, message: NodeMessage) -> None:
        with contextlib.suppress(zmq.Again):  # the connection is gone, or nobody reads: silence tells
            self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)
