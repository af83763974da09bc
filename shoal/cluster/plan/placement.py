"""Layouts: which degrees a model can be cut into, and on which nodes the ranks of a layout come to stand.

The degrees are checked by `config.parallel.check_degrees`, stages are cut by its `balance`, and several nodes are
filled as the engine's Ray launcher fills them (`executor.ray_placement`): there is no second book of rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from shoal.cluster.plan.devices import Machine
from shoal.cluster.plan.memory import Cut, layer_bytes, sum_bytes
from shoal.cluster.plan.shape import Matrix, ModelShape, Split
from shoal.config.model_config import SUPPORTED_ARCHITECTURES
from shoal.config.parallel import ParallelConfig, balance, balance_layers, check_degrees
from shoal.errors import ConfigError
from shoal.executor.ray_placement import NodeRoom, place_ranks

_MOST_STAGES = 16
# Up to so many devices all numbers of replicas are looked at; above, one and the most.
_FEW_DEVICES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees, and where the ranks are.

    shares_experts: experts lie whole on the ranks of a tensor group; in_lockstep: of all replicas together.
    tensor_nodes: nodes that one tensor group is spread over. crossings: for each boundary between stages whether it is
    one between nodes. way: "one": on one node; "servers": a server for each node; "ray": an engine over several nodes.
    """

    tensor_size: int
    pipeline_size: int
    data_size: int
    shares_experts: bool = False
    in_lockstep: bool = False
    partition: tuple[int, ...] = ()
    tensor_nodes: int = 1
    expert_nodes: int = 1
    crossings: tuple[bool, ...] = ()
    num_nodes: int = 1
    way: str = "one"

    @property
    def num_ranks(self) -> int:
        return self.tensor_size * self.pipeline_size * self.data_size

    @property
    def engine_ranks(self) -> int:
        """Ranks that work in lockstep."""
        return self.tensor_size * self.pipeline_size * (self.data_size if self.in_lockstep else 1)

    @property
    def expert_size(self) -> int:
        """Ranks that share the experts whole; 0: experts are cut."""
        return self.tensor_size * (self.data_size if self.in_lockstep else 1) if self.shares_experts else 0

    @property
    def cut(self) -> Cut:
        return Cut(tensor_size=self.tensor_size, partition=self.partition, expert_size=self.expert_size)

    @property
    def name(self) -> str:
        experts = f" × EP {self.expert_size}" if self.shares_experts else ""
        return f"TP {self.tensor_size} × PP {self.pipeline_size} × DP {self.data_size}{experts}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rejection:
    """A layout that cannot be, and why."""

    tensor_size: int
    pipeline_size: int
    data_size: int
    shares_experts: bool
    reason: str


def check_cut(
    shape: ModelShape, tensor_size: int, pipeline_size: int, shares_experts: bool, deterministic: bool
) -> None:
    """Raise ConfigError for degrees that the model cannot be cut into."""
    widths = list(shape.mlp_widths)
    if shape.num_experts and not shares_experts:
        widths.append(shape.expert_width)
    parallel = ParallelConfig(
        tensor_size=tensor_size, pipeline_size=pipeline_size, expert_parallel=shares_experts and tensor_size > 1
    )
    if shape.config.experts is not None:  # the engine knows its widths itself
        check_degrees(shape.config, parallel, deterministic=deterministic)
        widths = []
    elif not widths:  # experts are shared whole and nothing else has a width: heads alone decide
        widths = [shape.config.num_heads * 8]
    for width in widths:
        model = dataclasses.replace(shape.config, intermediate_size=width)
        check_degrees(model, parallel, deterministic=deterministic)
    for layer in shape.distinct_layers:
        for part in layer.parts:
            if isinstance(part, Matrix) and not (part.is_expert and shares_experts):
                _check_format(part, tensor_size)


def _check_format(part: Matrix, tensor_size: int) -> None:
    """A rank's part of a quantized matrix has scales of its own only where it holds whole groups or blocks."""
    unit = part.format.group_size if part.format.scales == "group" else part.format.block[1]
    if part.split is Split.IN and not part.format.can_cut_inputs(part.in_features, tensor_size):
        raise ConfigError(
            f"{part.in_features} inputs of {part.name} have {part.in_features // max(1, unit)} groups of {unit}, which "
            f"{tensor_size} ranks cannot share evenly"
        )


def partition(shape: ModelShape, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage: as the engine cuts a model that it knows; by bytes where layers may differ."""
    if num_stages not in shape.partitions:
        shape.partitions[num_stages] = _partition(shape, num_stages)
    return shape.partitions[num_stages]


def _partition(shape: ModelShape, num_stages: int) -> tuple[int, ...]:
    if num_stages == 1:
        return (len(shape.layers),)
    if shape.config.architecture in SUPPORTED_ARCHITECTURES:
        return balance_layers(shape.config, num_stages)
    costs = [float(layer_bytes(layer, 2, 1, 0)) for layer in shape.layers]
    return balance(costs, num_stages, first=costs[-1] / 100, last=float(sum_bytes([shape.head], 2)))


def layouts(shape: ModelShape, machine: Machine, *, deterministic: bool = False) -> Iterator[Layout | Rejection]:
    """All that the model can be cut into and the machine has devices for; where they cannot be, why.

    Without their partition, which takes a while for many stages. A tensor degree that cannot be is said once, not for
    each number of stages and replicas.
    """
    most = machine.num_devices
    ways = (False, True) if shape.num_experts else (False,)
    for shares_experts in ways:
        for tensor_size in range(1, most + 1):
            try:
                check_cut(shape, tensor_size, 1, shares_experts, deterministic)
            except ConfigError as error:
                yield Rejection(
                    tensor_size=tensor_size,
                    pipeline_size=1,
                    data_size=1,
                    shares_experts=shares_experts,
                    reason=str(error),
                )
                continue
            for pipeline_size in range(1, min(most // tensor_size, shape.config.num_layers, _MOST_STAGES) + 1):
                room = most // (tensor_size * pipeline_size)
                for data_size in range(1, room + 1) if most <= _FEW_DEVICES else sorted({1, room}):
                    for in_lockstep in (False, True) if shares_experts and data_size > 1 else (False,):
                        layout = Layout(
                            tensor_size=tensor_size,
                            pipeline_size=pipeline_size,
                            data_size=data_size,
                            shares_experts=shares_experts,
                            in_lockstep=in_lockstep,
                            crossings=(False,) * (pipeline_size - 1),
                        )
                        placed = place(machine, layout) if _can_share(shape, layout, machine) else None
                        if placed is not None:
                            yield placed


def _can_share(shape: ModelShape, layout: Layout, machine: Machine) -> bool:
    """Experts go whole to as many ranks. Replicas share them where there is one stage; replicas that do not are
    servers of their own, one for each node."""
    if not layout.shares_experts:
        return True
    ranks = layout.expert_size
    if ranks == 1 or shape.num_experts % ranks:
        return False
    if layout.in_lockstep or layout.data_size == 1:
        return layout.pipeline_size == 1 or layout.data_size == 1
    return machine.per_node // layout.engine_ranks == 1


def place(machine: Machine, layout: Layout) -> Layout | None:
    """Where the ranks come to stand; None where a replica finds no room beside the others."""
    if layout.num_ranks <= machine.per_node:
        return layout
    if layout.engine_ranks <= machine.per_node:
        replicas = machine.per_node // (layout.tensor_size * layout.pipeline_size)
        # As many on each node: one command serves them all.
        for num_nodes in range(2, machine.num_nodes + 1):
            if layout.data_size % num_nodes == 0 and layout.data_size // num_nodes <= replicas:
                return dataclasses.replace(layout, num_nodes=num_nodes, way="servers")
        return None
    return _spread(machine, layout)


def _spread(machine: Machine, layout: Layout) -> Layout | None:
    free = [machine.per_node] * machine.num_nodes
    parallel = ParallelConfig(tensor_size=layout.tensor_size, pipeline_size=layout.pipeline_size, backend="ray")
    tensor_nodes, used = 1, set[int]()
    crossings = [False] * (layout.pipeline_size - 1)
    for _ in range(layout.data_size):
        rooms = [
            NodeRoom(node_id=str(index), address=f"{index:04}", hostname="", free=room, total=machine.per_node)
            for index, room in enumerate(free)
        ]
        places = place_ranks(rooms, parallel, driver=f"{0:04}")
        if places is None:
            return None
        nodes = [int(place.node_id) for place in places]
        for node in nodes:
            free[node] -= 1
        used.update(nodes)
        size = layout.tensor_size
        stages = [nodes[start : start + size] for start in range(0, len(nodes), size)]
        tensor_nodes = max(tensor_nodes, *(len(set(stage)) for stage in stages))
        for index in range(len(stages) - 1):
            crossings[index] = crossings[index] or stages[index] != stages[index + 1]
    return dataclasses.replace(
        layout,
        tensor_nodes=tensor_nodes,
        expert_nodes=len(used) if layout.in_lockstep else tensor_nodes,
        crossings=tuple(crossings),
        num_nodes=len(used),
        way="ray",
    )
