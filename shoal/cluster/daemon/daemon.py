"""The daemon of a node: its heart, its server and the keeper of Ray's part, and what services may know of the node."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Sequence

import psutil

from shoal import network
from shoal.cluster import reach
from shoal.cluster.daemon import client, machine
from shoal.cluster.daemon.heart import Heart
from shoal.cluster.daemon.local_ranks import local_servers
from shoal.cluster.daemon.node_services import PEERS
from shoal.cluster.daemon.ray_keeper import RayKeeper
from shoal.cluster.daemon.ray_table import RayTable
from shoal.cluster.daemon.reports import ALIVE, FLAPPING, LEFT, NodeReport, PeerReport
from shoal.cluster.daemon.server import Server
from shoal.cluster.daemon.services import SERVICES
from shoal.cluster.daemon.wire import Nothing
from shoal.cluster.ray_node import NodePlan, is_up, ports_of
from shoal.errors import ShoalError, StartupError
from shoal.executor import ray_head
from shoal.log import get_logger
from shoal.network.node_record import NodeRecord

_LOOK_SECONDS = 1.0
# While the head knows of more nodes than this one, or of fewer, it is asked so often who they are.
_ASK_SECONDS = 2.0
_ANSWER_SECONDS = 5.0

logger = get_logger(__name__)


class Daemon:
    """Works from `run`, in the thread that calls it, until SIGTERM, or until the node's record is gone."""

    def __init__(self, plan: NodePlan, record: NodeRecord) -> None:
        self._plan = plan
        self._keeper = RayKeeper(plan, record)
        self._started = time.monotonic()
        host = reach.ANY_IPV6 if ":" in record.address else reach.ANY_IPV4
        self._server = Server(self, SERVICES, address=host, port=self.daemon_port)
        self._heart = Heart(
            record.address, host, self.daemon_port, plan.token, is_head=record.is_head, on_news=self._look_at_head
        )
        self._head_seen: tuple[str, int, int] | None = None
        self._ray_table = RayTable(plan.token)

    # --- NodeView ----------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        return self._keeper.record.address

    @property
    def head(self) -> str:
        return self._keeper.record.head

    @property
    def is_head(self) -> bool:
        return self._keeper.record.is_head

    @property
    def daemon_port(self) -> int:
        return ports_of(self.head).daemon

    @property
    def token(self) -> str:
        return self._plan.token

    def peers(self) -> Sequence[PeerReport]:
        return self._heart.peers()

    def report(self) -> NodeReport:
        memory = psutil.virtual_memory()
        record = self._keeper.record
        return NodeReport(
            address=record.address,
            hostname=socket.gethostname(),
            is_head=record.is_head,
            head=record.head,
            interface=network.interface_of(record.address),
            interfaces=machine.interfaces(),
            num_cpus=os.cpu_count() or 1,
            load=round(os.getloadavg()[0], 2),
            memory_total=memory.total,
            memory_available=memory.available,
            gpus=machine.gpus(),
            versions=machine.versions(),
            servers=local_servers(),
            ranks=self._heart.ranks(),
            incarnation=self._heart.incarnation,
            uptime=round(time.monotonic() - self._started, 1),
            ray=is_up(record),
            ray_trouble=self._keeper.trouble,
        )

    def ray_nodes(self) -> ray_head.Answer:
        return self._ray_table.read(self.head)

    # --- work --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Raises StartupError where a port is taken."""
        stopping = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopping.set())
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal of `shoal node start` may close
        self._heart.start()
        self._server.start()
        self._keeper.start()
        logger.info("the daemon of %s, a node of %s, is up on port %d", self.address, self.head, self.daemon_port)
        next_ask = 0.0
        while not stopping.wait(_LOOK_SECONDS):
            if self._keeper.is_obsolete:
                logger.warning("this node is recorded no more: its daemon ends")
                break
            if not (self._heart.is_running and self._server.is_running):
                raise StartupError("a thread of the daemon has ended")
            self._ray_table.stop_unasked()
            if time.monotonic() >= next_ask and not self._knows_all():
                next_ask = time.monotonic() + _ASK_SECONDS
                self._meet()
        self._keeper.stop()
        self._ray_table.stop()
        self._heart.stop()
        self._server.stop()
        logger.info("the daemon has ended")

    def _knows_all(self) -> bool:
        """As far as the head's beats tell. The head itself learns of nodes by theirs."""
        if self.is_head:
            return True
        address = network.split_endpoint(self.head)[0]
        peers = [peer for peer in self._heart.peers() if peer.state != LEFT]
        return any(peer.address == address and peer.num_peers == len(peers) for peer in peers)

    def _meet(self) -> None:
        """Learn of the other nodes from the head."""
        address = network.split_endpoint(self.head)[0]
        self._heart.learn(address, address, True)
        endpoint = network.format_endpoint(address, self.daemon_port)
        try:
            answer = client.ask(endpoint, self.token, PEERS, Nothing(), timeout=_ANSWER_SECONDS)
        except ShoalError as error:
            logger.debug("the head does not say who there is: %s", error)
            return
        for peer in answer.peers:
            if peer.state != LEFT:
                self._heart.learn(peer.address, peer.hostname, peer.is_head)

    def _look_at_head(self) -> None:
        """After a silence of the head, or its start anew, it may not know this node any more."""
        address = network.split_endpoint(self.head)[0]
        for peer in self._heart.peers():
            if peer.address == address and peer.state in (ALIVE, FLAPPING):
                seen = (peer.address, peer.num_flaps, peer.num_restarts)
                if self._head_seen is not None and seen != self._head_seen:
                    self._keeper.suspect()
                self._head_seen = seen
