"""Keeps Ray's part of a node up: starts it again when it has ended, and when the head has given the node up.

Ray takes a node that was cut off for dead for ever, and the node ends itself when it hears of that, or 20 s later; a
head that was started anew knows none of its nodes. Either way the node joins again as a new one of the same address.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time

import msgspec

from shoal import network
from shoal.cluster import ray_node, reach
from shoal.errors import ConfigError, ShoalError, StartupError
from shoal.executor import ray_head
from shoal.log import get_logger
from shoal.network.node_record import NodeRecord, read_record, write_record

_LOOK_SECONDS = 0.5
_SHORTEST_WAIT, _LONGEST_WAIT = 1.0, 30.0
_REMIND_SECONDS = 30.0

logger = get_logger(__name__)


class RayKeeper:
    """Works from `start` until `stop`, in a thread of its own."""

    def __init__(self, plan: ray_node.NodePlan, record: NodeRecord) -> None:
        self._plan, self.record = plan, record
        self.trouble = ""  # what keeps Ray's part from being up; "" while it is
        self.is_obsolete = False  # another node, or none, is recorded for this machine
        self._suspected = threading.Event()
        self._stopping = threading.Event()
        self._is_down = False
        self._said, self._said_at = "", 0.0
        self._thread = threading.Thread(target=self._run, name="ray-keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What it has just begun to start ends with it."""
        self._stopping.set()
        self._thread.join()

    def suspect(self) -> None:
        """The head was out of sight, or is a new one: see whether it still knows this node. From any thread."""
        self._suspected.set()

    def _run(self) -> None:
        wait = _SHORTEST_WAIT
        while not self._stopping.wait(_LOOK_SECONDS):
            recorded = read_record()
            if recorded is None or recorded.directory != self.record.directory:
                self.is_obsolete = True
                return
            if not recorded.processes:
                continue  # `shoal node start` is still at work on it
            self.record = recorded
            try:
                if ray_node.is_up(self.record):
                    if self._suspected.is_set():
                        self._verify()
                    continue
                if not self._is_down:
                    self._is_down = True
                    self._say("Ray's part of this node has ended")
                self._start_again()
                wait = _SHORTEST_WAIT
            except ShoalError as error:
                self._say(str(error))
                self._stopping.wait(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
            except Exception:
                logger.exception("cannot keep Ray's part up")
                self._stopping.wait(_LONGEST_WAIT)

    def _verify(self) -> None:
        answer = ray_head.ask_head(self.record.head, self._plan.token)
        self._suspected.clear()
        if any(node.alive and node.address == self.record.address for node in answer.nodes):
            self.trouble = ""
            return
        self._say("the head has given this node up while it did not hear it; it joins again")
        ray_node.end_ray(self.record)

    def _start_again(self) -> None:
        """Raises StartupError where it does not come up; nothing of it is left then."""
        ray_node.end_ray(self.record)  # what the end of some processes has left
        head = self._head()
        host, port = network.split_endpoint(head)
        if self._plan.head is not None and (state := reach.probe(host, port)) != reach.OPEN:
            raise StartupError(f"waiting for the head at {head}, which does not answer ({state})")
        logger.info("starting Ray's part again")
        starter = ray_node.start_ray(self._plan, self.record.address, head, self.record.directory)
        record = msgspec.structs.replace(self.record, head=head, session=starter.pid)
        try:
            _write(record)  # `shoal node stop` finds what has begun, whatever becomes of this process
            self._wait_for(starter)
            record = ray_node.with_processes(record)
            ray_node.wait_until_listed(record, self._plan.token, is_unwanted=self._stopping.is_set)
        except BaseException:
            starter.kill()
            starter.communicate()
            ray_node.end_ray(ray_node.with_processes(record))
            raise
        self.record = record
        _write(record)
        self._suspected.clear()
        self._is_down, self._said = False, ""
        self.trouble = ""
        logger.info("Ray's part of this node is up again: a node of the cluster %s", head)

    def _wait_for(self, starter: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + ray_node.START_SECONDS
        while starter.poll() is None and time.monotonic() < deadline:
            if self._stopping.wait(_LOOK_SECONDS / 5):
                raise StartupError("the node ends")
        ray_node.wait_for_ray(starter)

    def _head(self) -> str:
        """By name where one was given: its address may be another by now. A name that does not resolve counts no more
        than the address that it had."""
        if self._plan.head is None:
            return self.record.head
        host, port = network.split_endpoint(self._plan.head, ray_head.DEFAULT_PORT)
        with contextlib.suppress(ConfigError):
            return network.format_endpoint(network.resolve_head(host), port)
        return self.record.head

    def _say(self, what: str) -> None:
        """Once, and again now and then while it lasts."""
        self.trouble = what
        if what != self._said or time.monotonic() - self._said_at >= _REMIND_SECONDS:
            self._said, self._said_at = what, time.monotonic()
            logger.warning("%s", what)


def _write(record: NodeRecord) -> None:
    """Unless the node is being ended, which takes its daemon out of the record first."""
    latest = read_record()
    if latest is None or latest.daemon is None:
        raise StartupError("the node ends")
    write_record(record)
