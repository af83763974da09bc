"""A node without Ray, for tests: the daemon's server and heart with all services, and listeners on Ray's ports.

`python -m tests.multihost.doctor_node HEAD ADDRESS CLOCK` prints "up" when it listens. CLOCK: seconds that its clock is
ahead. The token is the environment's.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time

from shoal import log, network
from shoal.cluster.daemon.heart import Heart
from shoal.cluster.daemon.server import Server
from shoal.cluster.daemon.services import SERVICES
from shoal.cluster.doctor.services import CLOCK, Clock
from shoal.cluster.ports import NodePorts, needed_between_nodes
from shoal.cluster.processes import table
from shoal.network.node_record import NodeRecord, boot_identity, write_record


class Node:
    def __init__(self, head: str, address: str, clock: float) -> None:
        self.head, self.address, self.token = head, address, network.load_token()
        host, port = network.split_endpoint(head)
        self.is_head = host == address
        self.ports = NodePorts(head=port)
        self.daemon_port = self.ports.daemon
        self._heart = Heart(
            address, "0.0.0.0", self.daemon_port, self.token, is_head=self.is_head, on_news=lambda: None
        )
        late = dataclasses.replace(CLOCK, run=lambda *_: Clock(time.time() + clock))
        services = [late if service is CLOCK else service for service in SERVICES]
        self._server = Server(self, services, address="0.0.0.0", port=self.daemon_port)

    def peers(self):
        return self._heart.peers()

    def report(self):
        raise AssertionError("no doctor asks for it")

    def ray_nodes(self):
        raise AssertionError("no doctor asks for it")

    def run(self) -> None:
        listeners = [
            network.listen("0.0.0.0", port.first)
            for port in needed_between_nodes(self.ports, is_head=self.is_head)
            if port.protocol == "tcp" and port.first == port.last and port.name != "daemon"
        ]
        self._heart.start()
        self._server.start()
        head = network.split_endpoint(self.head)[0]
        if not self.is_head:
            self._heart.learn(head, head, True)
        me = table()[os.getpid()].process
        write_record(
            NodeRecord(self.head, self.address, self.is_head, os.getsid(0), [me], "/nowhere", boot_identity(), me)
        )
        print("up", flush=True)
        threading.Event().wait()
        del listeners


if __name__ == "__main__":
    log.configure(role="daemon")
    Node(sys.argv[1], sys.argv[2], float(sys.argv[3])).run()
