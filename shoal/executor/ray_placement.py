"""Which node of a Ray cluster each rank goes to. Pure arithmetic; RayLauncher calls it with what Ray says is free."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from shoal.config.parallel import ParallelConfig


@dataclasses.dataclass(frozen=True)
class NodeRoom:
    """A node that is alive: ranks it has room for now (`free`), and when nothing runs on it (`total`)."""

    node_id: str
    address: str
    hostname: str
    free: int
    total: int

    @property
    def name(self) -> str:
        return f"{self.hostname} ({self.address})"


def place_ranks(nodes: Sequence[NodeRoom], parallel: ParallelConfig, driver: str) -> list[NodeRoom] | None:
    """The node of each rank; None where there is no room for all. driver: address of the node the engine core is on.

    Each stage goes whole to one node where it fits: stage 0 to the core's, the next to the node with the fewest stages
    so far, so that stages are spread over the machines. A stage that fits nowhere takes the nodes with the most room.
    """
    free = {node.node_id: node.free for node in nodes}
    num_stages = {node.node_id: 0 for node in nodes}
    if sum(free.values()) < parallel.world_size:
        return None
    places: list[NodeRoom] = []
    for stage in range(parallel.pipeline_size):

        def preference(node: NodeRoom, stage: int = stage) -> tuple[bool, int, int, str]:
            is_core = stage == 0 and node.address == driver
            return not is_core, num_stages[node.node_id], -free[node.node_id], node.address

        order = sorted(nodes, key=preference)
        whole = [node for node in order if free[node.node_id] >= parallel.tensor_size]
        if not whole and stage > 0:
            order.sort(key=lambda node: (-free[node.node_id], node.address))
        wanted = parallel.tensor_size
        for node in whole[:1] or order:
            taken = min(wanted, free[node.node_id])
            if taken:
                places += [node] * taken
                free[node.node_id] -= taken
                num_stages[node.node_id] += 1
                wanted -= taken
    return places


def describe_room(nodes: Sequence[NodeRoom], resource: str) -> str:
    """ "node-a (10.0.0.1) has 4 GPUs, 2 of them free; node-b …"."""
    parts = []
    for node in sorted(nodes, key=lambda node: node.address):
        free = "all free" if node.free == node.total else f"{node.free} of them free"
        parts.append(f"{node.name} has {node.total} {resource}s" + (f", {free}" if node.total else ""))
    return "; ".join(parts) or "there is no node"
