"""NodesLauncher: the ranks of --nnodes machines without Ray. Node 0's as children, the others through their agents.

The registry makes it for `mp` with several nodes.
"""

from __future__ import annotations

import threading

from shoal import network
from shoal.config.engine_config import EngineConfig
from shoal.errors import ConfigError, StartupError
from shoal.executor.launcher import Launcher, OnExit, WorkerLink
from shoal.executor.multiprocess import LocalLauncher
from shoal.executor.node_door import NodeDoor
from shoal.executor.node_layout import index_on_node, node_of, ranks_on, ranks_per_node
from shoal.log import get_logger
from shoal.messages import NodeStop

logger = get_logger(__name__)


class NodesLauncher(Launcher):
    """Nodes that come late are not waited for: the executor has its own deadline for their workers."""

    def __init__(self, config: EngineConfig) -> None:
        self._config, self._parallel = config, config.parallel
        self._local = self.make_local(config, ranks_on(self._parallel, 0))
        self._failure = ""
        self._stopping = False
        self._lock = threading.Lock()
        self._door: NodeDoor | None = None

    def make_local(self, config: EngineConfig, ranks: list[int]) -> Launcher:
        """What starts this node's own ranks."""
        return LocalLauncher(config, ranks)

    def listen_address(self) -> str:
        """Raises ConfigError where the master's address is not one of this machine."""
        master = self._parallel.master_address
        assert master is not None, "config.resolve asks for it"
        address = network.resolve_head(master)
        try:
            network.interface_of(address)
        except ConfigError as error:
            named = address if master == address else f"{master} ({address})"
            raise ConfigError(
                f"master_addr {named} is no address of this machine, which is node 0 (--node-rank). It has: "
                f"{network.format_interfaces()}"
            ) from error
        return address

    def _compare_addresses(self, master: str) -> None:
        """Warn where the workers of this node are to be reached at another address than the one that is known to be
        right. On purpose that may be a faster network; by mistake the others would wait until the start's deadline."""
        chosen = network.host_address(master)
        if chosen != master:
            logger.warning(
                "%s has the workers of the other nodes come to %s (%s) on this machine, and not to %s (%s), the "
                "address of --master-addr. If they do not reach that, the start does not end: unset the variable here, "
                "or have it name %s",
                network.named_by(),
                chosen,
                network.interface_of(chosen),
                master,
                network.interface_of(master),
                network.interface_of(master),
            )

    def token(self) -> str:
        return network.load_token(self._parallel.token_file)

    def start(self, link: WorkerLink, on_exit: OnExit) -> None:
        """Open the door to the other nodes, and start the workers of this one.

        Raises ConfigError where a variable names an interface that is none, or that the other nodes cannot reach.
        """
        with self._lock:
            if self._stopping:
                raise StartupError("the engine was ended while its nodes were started")
            address = self.listen_address()
            self._compare_addresses(address)
            self._door = NodeDoor(self._config, address, link, on_exit)
        self._local.start(link, on_exit)

    def describe(self, rank: int) -> str:
        node_rank = node_of(self._parallel, rank)
        if node_rank == 0:
            return self._local.describe(rank)
        where = self._door.describe(node_rank) if self._door is not None else f"on node {node_rank}"
        return f"rank {rank} ({where})"

    def device_index(self, rank: int, local_rank: int) -> int:
        return index_on_node(self._parallel, rank)

    def num_sharing(self, local_size: int) -> int:
        return ranks_per_node(self._parallel)

    def tell(self, reason: str) -> None:
        self._failure = self._failure or reason

    def abandon(self) -> None:
        self.stop(0.0)

    def stop(self, grace_seconds: float) -> None:
        with self._lock:
            self._stopping = True
            door, self._door = self._door, None
        if door is not None:
            door.begin_close(NodeStop(grace_seconds, self._failure))
        self._local.stop(grace_seconds)
        if door is not None:
            door.finish_close()
