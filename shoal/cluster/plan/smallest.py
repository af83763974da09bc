"""Where nothing fits: the smallest machine that would do, of the same devices and of known ones."""

from __future__ import annotations

import dataclasses

from shoal.cluster.plan.candidates import measure
from shoal.cluster.plan.devices import Machine, of_gpu
from shoal.cluster.plan.gpus import GPUS
from shoal.cluster.plan.memory import Load, request_tokens, sum_bytes
from shoal.cluster.plan.placement import Rejection, layouts, partition
from shoal.cluster.plan.shape import ModelShape

_USUAL_PER_NODE = (1, 2, 4, 8)
_MOST_NODES = 32


def smallest_machines(shape: ModelShape, machine: Machine, load: Load, *, deterministic: bool = False) -> list[Machine]:
    """At most two that hold the load: of the devices at hand, and one node of known GPUs with the least memory."""
    found = []
    same = _more_of_the_same(shape, machine, load, deterministic)
    if same is not None:
        found.append(same)
    if not machine.device.is_cpu:
        other = _one_node(shape, machine, load, deterministic)
        if other is not None:
            found.append(other)
    return found


def _more_of_the_same(shape: ModelShape, machine: Machine, load: Load, deterministic: bool) -> Machine | None:
    per_node = machine.per_node
    choices = []
    if not machine.device.is_cpu and machine.num_nodes == 1:
        # A single node grows to eight, then there are more of them.
        choices = [(1, size) for size in _USUAL_PER_NODE if size > per_node]
        per_node = max(per_node, 8)
    choices += [(nodes, per_node) for nodes in range(2, _MOST_NODES + 1) if nodes * per_node > machine.num_devices]
    for num_nodes, size in choices:
        larger = dataclasses.replace(machine, num_nodes=num_nodes, per_node=size, names=())
        if _enough(shape, larger, load) and _holds(shape, larger, load, deterministic):
            return larger
    return None


def _one_node(shape: ModelShape, machine: Machine, load: Load, deterministic: bool) -> Machine | None:
    options = [
        Machine(num_nodes=1, per_node=size, device=of_gpu(gpu), text="")
        for gpu in GPUS
        for size in _USUAL_PER_NODE
        if gpu.served and gpu.name != machine.device.name and (gpu.bf16 or load.dtype != "bfloat16")
    ]
    options.sort(key=lambda each: (each.num_devices * each.device.memory_bytes, each.num_devices))
    for option in options:
        if _enough(shape, option, load) and _holds(shape, option, load, deterministic):
            return option
    return None


def _enough(shape: ModelShape, machine: Machine, load: Load) -> bool:
    """A quick look: the weights alone, spread evenly."""
    return machine.num_devices * machine.device.memory_bytes > sum_bytes(shape.parts(), load.itemsize)


def _holds(shape: ModelShape, machine: Machine, load: Load, deterministic: bool) -> bool:
    """Whether one replica over all devices holds the load; on CPUs, where the engine bounds its cache, one request."""
    wanted = 1 if machine.device.is_cpu else load.concurrency
    return capacity(shape, machine, load, deterministic=deterministic) >= wanted


def capacity(shape: ModelShape, machine: Machine, load: Load, *, deterministic: bool = False) -> int:
    """Requests of full length that a replica holds in the first layout that fits, those with the most ranks first."""
    cuts = [
        each
        for each in layouts(shape, machine, deterministic=deterministic)
        if not isinstance(each, Rejection) and each.num_ranks == each.engine_ranks
    ]
    weights = sum_bytes(shape.parts(), load.itemsize)
    for each in sorted(cuts, key=lambda layout: (-layout.engine_ranks, -layout.tensor_size)):
        if weights > each.engine_ranks * machine.device.memory_bytes:
            continue
        layout = dataclasses.replace(each, partition=partition(shape, each.pipeline_size))
        room = measure(shape, layout, machine, load)
        if not isinstance(room, Rejection):
            return room[2] // request_tokens(load)
    return 0
