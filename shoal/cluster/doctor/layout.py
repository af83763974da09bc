"""Whether a model fits these machines, and how: `shoal plan`'s arithmetic over what they were seen to have."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.cluster.doctor.facts import LayoutFacts, NodeFacts
from shoal.cluster.plan.devices import Machine, cpu
from shoal.cluster.plan.here import device_of
from shoal.cluster.plan.planner import Wish, make_plan
from shoal.cluster.plan.report import refusal_text
from shoal.config.sizes import format_size
from shoal.errors import ShoalError


def plan_layout(model: str, nodes: Sequence[NodeFacts], utilization: float) -> LayoutFacts:
    """model: as it is named here; its config.json is read. utilization: share of a GPU's memory that it may have."""
    try:
        machine = machine_of(nodes)
        plan = make_plan(Wish(model=model, utilization=utilization), machine)
    except ShoalError as error:
        return LayoutFacts("unknown", str(error))
    if plan.choice is None:
        return LayoutFacts("none", refusal_text(plan))
    memory = plan.choice.candidate.memory
    return LayoutFacts(
        "fits",
        f"{plan.choice.candidate.layout.name} on {machine.describe()}: {format_size(memory.weights)} of weights on the "
        f"fullest rank, of {format_size(memory.budget)}; {format_size(max(memory.cache, 0))} are left for the KV cache",
    )


def machine_of(nodes: Sequence[NodeFacts]) -> Machine:
    """Of unequal machines each counts as the least; with GPUs on some, those without are left out."""
    with_gpus = [node for node in nodes if node.gpus.gpus and node.versions.torch.cuda]
    if with_gpus:
        least = min((gpu for node in with_gpus for gpu in node.gpus.gpus), key=lambda gpu: gpu.total_bytes)
        return Machine(
            num_nodes=len(with_gpus),
            per_node=min(len(node.gpus.gpus) for node in with_gpus),
            device=device_of(least.name, least.total_bytes),
            text="these machines",
            names=tuple(node.address for node in with_gpus),
        )
    memory = min(node.usable_memory_bytes for node in nodes)
    cores = min(node.system.num_usable_cpus for node in nodes)
    names = tuple(node.address for node in nodes)
    return Machine(num_nodes=len(nodes), per_node=1, device=cpu(cores, memory), text="these machines", names=names)
