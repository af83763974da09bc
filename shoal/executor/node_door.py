"""NodeDoor: where the agents of the other nodes come in, on node 0: compared, told to start, heard, told to end.

`nodes.NodesLauncher` owns one; the other end is `node_agent`. A thread of its own serves all agents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from shoal import network
from shoal.config.engine_config import EngineConfig
from shoal.executor.launcher import OnExit, WorkerLink
from shoal.executor.node_layout import describe_differences, node_facts, ranks_on
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

BEAT_SECONDS = 0.5
# Either end believes the other to be lost after so much silence; sooner where the connection is closed.
SILENCE_SECONDS = 8.0
REFUSED_EVENTS = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
# For a node to say that its workers are gone. It ends them also when this is not waited for.
_STOP_SECONDS = 3.0
_REMIND_SECONDS = 10.0


@dataclasses.dataclass
class _Node:
    """Another node whose agent has come. descriptor: of its connection, by which a closed one is told."""

    identity: bytes
    name: str
    descriptor: int
    last_heard: float
    gone: bool = False


class NodeDoor:
    """Open from the start on; `close` ends the agents, and waits for them."""

    def __init__(self, config: EngineConfig, address: str, link: WorkerLink, on_exit: OnExit) -> None:
        """address: of this host, to listen on. link: for the workers of the other nodes. on_exit: see `Launcher.start`.

        Raises StartupError where the port is taken.
        """
        assert link.token is not None, "no port is open to those who know no token"
        self._parallel, self._link, self._on_exit = config.parallel, link, on_exit
        self._others = [node for node in range(1, self._parallel.num_nodes) if ranks_on(self._parallel, node)]
        self._facts = node_facts(config)
        self._nodes: dict[int, _Node] = {}
        self._refusals: dict[int, str] = {}
        self._num_strangers = 0
        self._stop_order: NodeStop | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(NodeMessage)
        port = self._parallel.master_port + self._parallel.data_rank
        listener = network.listen(address, port, way_out="choose another with --master-port, the same on every node")
        self.endpoint = network.format_endpoint(address, port)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.ipv6 = ":" in address
        network.admit_token(self._socket, link.token)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | REFUSED_EVENTS)
        self._socket.set(zmq.USE_FD, listener.detach())
        self._socket.bind(f"tcp://{self.endpoint}")
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="node-door", daemon=True)
        self._thread.start()

    def describe(self, node_rank: int) -> str:
        """ "on node 1, node-b 10.0.0.4, pid 4711", or that it has not come, and what is known of that."""
        node = self._nodes.get(node_rank)
        if node is not None:
            return f"on {node.name}"
        refusal = self._refusals.get(node_rank)
        if refusal is None and self._num_strangers:
            refusal = f"{self._num_strangers} connections without this cluster's token were turned away"
        hint = refusal or "the same command is to be started there, with its own --node-rank"
        return f"on node {node_rank}, which has not come to {self.endpoint}: {hint}"

    def begin_close(self, order: NodeStop) -> None:
        """Tell the nodes to end, and report nothing more of them. From any thread."""
        self._stop_order = order
        os.eventfd_write(self._wake, 1)

    def finish_close(self) -> None:
        """Return when the workers of the other nodes are gone, or cannot be heard of. Once, after `begin_close`."""
        self._thread.join()
        os.close(self._wake)

    # --- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # nobody else would notice
            logger.exception("cannot serve the other nodes any more")
            for node_rank in self._others:
                self._report(node_rank, f"is on its own: node 0 cannot serve it ({error})")
        finally:
            self._context.destroy(linger=500)

    def _serve(self) -> None:
        poller = zmq.Poller()
        for source in (self._socket, self._monitor, self._wake):
            poller.register(source, zmq.POLLIN)
        next_beat, next_reminder = 0.0, time.monotonic() + _REMIND_SECONDS
        stop_until: float | None = None
        while True:
            ready = dict(poller.poll(int(BEAT_SECONDS * 1000)))
            if self._wake in ready:
                os.eventfd_read(self._wake)
            closed = self._closed_connections()
            with contextlib.suppress(zmq.Again):
                while True:
                    self._take(self._socket.recv_multipart(zmq.NOBLOCK, copy=False))
            for node_rank in closed:
                self._lose(node_rank, f"is gone with node {node_rank}: its connection was closed, its agent has ended")
            now = time.monotonic()
            order = self._stop_order
            if order is not None:
                if stop_until is None:
                    stop_until = now + order.grace_seconds + _STOP_SECONDS
                    self._tell_all(order)
                if now > stop_until or all(node.gone for node in self._nodes.values()):
                    return
                continue
            if now >= next_beat:
                next_beat = now + BEAT_SECONDS
                self._tell_all(ExecutorBeat())
                self._look_for_silence(now)
            if now >= next_reminder and len(self._nodes) < len(self._others):
                next_reminder = now + _REMIND_SECONDS
                missing = [str(node) for node in self._others if node not in self._nodes]
                logger.info("waiting at %s for node %s", self.endpoint, ", ".join(missing))

    def _take(self, frames: list[zmq.Frame]) -> None:
        identity = frames[0].bytes
        try:
            message = self._decoder.decode(frames[-1].bytes)
        except msgspec.MsgspecError as error:
            self._send(identity, NodeRefused(f"this is no message of this version of Shoal: {error}"))
            return
        if isinstance(message, NodeHello):
            self._welcome(identity, int(frames[-1].get(zmq.SRCFD)), message)
            return
        node_rank = next((rank for rank, node in self._nodes.items() if node.identity == identity), None)
        if node_rank is None:
            self._send(identity, NodeRefused("this is another run of node 0 than the one that this node came to"))
            return
        node = self._nodes[node_rank]
        node.last_heard = time.monotonic()
        match message:
            case WorkerExited(rank, how):
                if self._stop_order is None:
                    self._on_exit(rank, how)
            case NodeLeaving(reason):
                self._lose(node_rank, f"was ended, because node {node_rank} left: {reason}")
            case NodeStopped():
                node.gone = True
            case NodeBeat():
                pass

    def _welcome(self, identity: bytes, descriptor: int, hello: NodeHello) -> None:
        """Let a node in, or say why not. One that is refused ends; this one goes on waiting for the right one."""
        came = f"{hello.hostname} {hello.address}, pid {hello.pid}"
        name = f"node {hello.node_rank}, {came}"
        reason = ""
        if self._stop_order is not None:
            reason = "the engine is ending"
        elif differences := describe_differences(hello.facts, self._facts):
            reason = f"all nodes must be started alike, but {name}, differs from node 0 in {differences}"
        elif hello.node_rank not in range(1, self._parallel.num_nodes):
            reason = f"there is no node {hello.node_rank}: --node-rank goes from 0 to {self._parallel.num_nodes - 1}"
        elif hello.node_rank in self._nodes:
            reason = (
                f"{self._nodes[hello.node_rank].name}, is here already, and {came}, came with the same --node-rank; "
                "each machine needs its own"
            )
        if reason:
            logger.warning("refused %s: %s", name, reason)
            self._refusals[hello.node_rank] = reason
            self._send(identity, NodeRefused(reason))
            return
        self._nodes[hello.node_rank] = _Node(identity, name, descriptor, time.monotonic())
        ranks = ranks_on(self._parallel, hello.node_rank)
        logger.info("%s, is here with rank %s", name, ", ".join(map(str, ranks)))
        self._send(identity, NodeStart(self._link.generation, self._link.endpoint))

    def _closed_connections(self) -> list[int]:
        """The nodes whose connections were closed. To be asked before messages are taken, as a node that comes with one
        of them may get the descriptor of a closed one; and acted upon after, as last words may be among them."""
        closed = []
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            if event["event"] & REFUSED_EVENTS:
                self._num_strangers += 1
                if self._num_strangers == 1:
                    logger.warning(
                        "turned away a connection to %s: it does not have this cluster's token", self.endpoint
                    )
                continue
            closed += [rank for rank, node in self._nodes.items() if node.descriptor == event["value"]]
        return closed

    def _look_for_silence(self, now: float) -> None:
        for node_rank, node in self._nodes.items():
            if now - node.last_heard > SILENCE_SECONDS:
                self._lose(
                    node_rank,
                    f"is lost with node {node_rank}: nothing was heard of it for {now - node.last_heard:.0f} s; the "
                    "machine is down or cut off, or its `shoal serve` is stopped",
                )

    def _lose(self, node_rank: int, how: str) -> None:
        node = self._nodes[node_rank]
        if not node.gone:
            node.gone = True
            self._report(node_rank, how)

    def _report(self, node_rank: int, how: str) -> None:
        if self._stop_order is None:
            for rank in ranks_on(self._parallel, node_rank):
                self._on_exit(rank, how)

    def _tell_all(self, order: NodeOrder) -> None:
        for node in self._nodes.values():
            if not node.gone:
                self._send(node.identity, order)

    def _send(self, identity: bytes, order: NodeOrder) -> None:
        self._socket.send_multipart([identity, self._encoder.encode(order)])
