"""A machine of one file's list as a node of a Ray cluster, for as long as `shoal serve` runs there.

So it is where the file says `distributed_executor_backend: ray`: `shoal status`, `doctor` and `verify` see the machines
then, and an engine that loses ranks is started again. The first machine is the head. `shoal serve` calls it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import msgspec

from shoal import network
from shoal.cluster import node, processes, reach
from shoal.cluster.daemon import client
from shoal.cluster.daemon.node_services import PEERS, RAY_NODES
from shoal.cluster.daemon.reports import LEFT, LOST
from shoal.cluster.daemon.wire import Nothing
from shoal.cluster.one_file import Place
from shoal.cluster.ray_node import NodePlan, ports_of
from shoal.errors import ConfigError, NodeError, StartupError
from shoal.executor.ray_head import DEFAULT_PORT
from shoal.log import get_logger
from shoal.network.node_record import read_record, write_record

_LOOK_SECONDS = 1.0
_REMIND_SECONDS = 10.0
# By then an engine has ended for want of the head, and so has Ray's part of this node.
_HEAD_LOST_SECONDS = 60.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

logger = get_logger(__name__)


class FileNode:
    """This machine's node. `run_beside` is the context in which the engine, or a machine's entrance, runs."""

    def __init__(self, place: Place, token_file: str | None, timeout: float) -> None:
        """timeout: seconds within which all machines must be there."""
        self._place, self._timeout = place, timeout
        self._others = [each for index, each in enumerate(place.machines) if index != place.rank]
        self._head = network.format_endpoint(network.split_endpoint(place.head)[0], DEFAULT_PORT)
        self._token = network.load_token(token_file)
        self._endpoint = network.format_endpoint(place.address, ports_of(self._head).daemon)
        self._addresses: set[str] = set()
        self._reason = ""

    @contextlib.contextmanager
    def run_beside(self) -> Iterator[None]:
        """Start the node, wait for all others, and end it at last. Ctrl-C and SIGTERM end what is within in order.

        Raises StartupError where a machine does not come, and where another one has ended.
        """
        before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
        is_ours = False
        stopping = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(stopping,), name="file-node", daemon=True)
        try:
            is_ours = self._start()
            self._wait_for_all()
            watcher.start()
            yield
        except KeyboardInterrupt:
            logger.info("ended by a signal")
        finally:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            stopping.set()
            if is_ours and self._is_here():
                node.stop_node()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._reason:
            raise StartupError(self._reason)

    def stay(self) -> None:
        """Until a signal, or the end of another machine, which comes as one."""
        while True:
            signal.pause()

    def _start(self) -> bool:
        """Whether the node is this process's: not where `shoal node start` made it one of the same cluster.

        Raises StartupError where it is one of another cluster, or where another `shoal serve` holds it.
        """
        me = processes.identify(os.getpid())
        record = read_record()
        if record is not None and record.head == self._head and node.runs(record):
            if record.owner is None:
                return False
            if processes.is_alive(record.owner):
                raise StartupError(f"`shoal serve` of this file runs on this machine already (pid {record.owner.pid})")
            logger.info("taking over the node that an earlier `shoal serve` left behind")
            write_record(msgspec.structs.replace(record, owner=me))
            node.revive_daemon(self._token)
            return True
        is_head = self._place.rank == 0
        if not is_head:
            self._wait_for_head()
        logger.info("starting this machine's node of the cluster %s", self._head)
        record = node.start_node(
            NodePlan(head=None if is_head else self._head, token=self._token, node_ip=self._place.address)
        )
        write_record(msgspec.structs.replace(record, owner=me))
        return True

    def _is_here(self) -> bool:
        record = read_record()
        return record is not None and record.head == self._head

    def _wait_for_head(self) -> None:
        host, port = network.split_endpoint(self._head)
        ports = (port, ports_of(self._head).daemon)

        def missing() -> str:
            try:
                states = reach.probe_all([(network.resolve_head(host), each) for each in ports])
            except ConfigError as error:  # a name that comes with its machine
                return str(error)
            closed = [f"port {each} is {state}" for (_, each), state in states.items() if state != reach.OPEN]
            return f"the first machine, {host}: {', '.join(closed)}" if closed else ""

        self._wait(missing)

    def _wait_for_all(self) -> None:
        def missing() -> str:
            try:
                nodes = client.ask(self._endpoint, self._token, RAY_NODES, Nothing()).nodes
            except NodeError as error:
                return str(error)
            alive = {each.address for each in nodes if each.alive} - {self._place.address}
            there = {address for each in self._others for address in each.addresses if address in alive}
            absent = [each for each in self._others if each.addresses and not there.intersection(each.addresses)]
            # A name that only its own machine resolves: whoever has come and is nobody else's.
            nameless = [each for each in self._others if not each.addresses]
            strangers = sorted(alive - there)
            self._addresses = there | set(strangers[: len(nameless)])
            return ", ".join(map(str, absent + nameless[len(strangers) :]))

        self._wait(missing)
        logger.info("all %d machines are there", self._place.num_machines)

    def _wait(self, missing: Callable[[], str]) -> None:
        deadline, next_reminder = time.monotonic() + self._timeout, time.monotonic() + _LOOK_SECONDS
        while what := missing():
            now = time.monotonic()
            if now >= deadline:
                raise StartupError(f"not there within {self._timeout:g} s (--startup-timeout): {what}")
            if now >= next_reminder:
                next_reminder = now + _REMIND_SECONDS
                logger.info("waiting for %s", what)
            time.sleep(_LOOK_SECONDS)

    def _watch(self, stopping: threading.Event) -> None:
        """End this process where another machine of the file says that it goes, where the first one is silent for long,
        or where this machine's node has been ended."""
        head = network.split_endpoint(self._head)[0]
        came: set[str] = set()
        while not stopping.wait(_LOOK_SECONDS):
            try:
                peers = client.ask(self._endpoint, self._token, PEERS, Nothing()).peers
            except NodeError:
                peers = []
                if not stopping.is_set() and not node.revive_daemon(self._token):
                    self._reason = "this machine's node has been ended; all machines of the file end together"
            for peer in peers:
                if peer.address not in self._addresses:
                    continue
                silent = peer.seconds_since_heard or 0.0
                if peer.state != LEFT:
                    came.add(peer.address)
                elif peer.address in came:
                    self._reason = f"{peer.hostname} ({peer.address}) has ended; all machines of the file end together"
                if peer.state == LOST and peer.address == head and silent > _HEAD_LOST_SECONDS:
                    self._reason = f"the first machine, {peer.address}, has not been heard of for {silent:.0f} s"
            if self._reason:
                logger.error("%s", self._reason)
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _interrupt(*_: object) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
