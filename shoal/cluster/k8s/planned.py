"""What a plan makes of a model and the machines of one replica: the layout of its pods, and what each asks for."""

from __future__ import annotations

import dataclasses
import math

from shoal.cluster.k8s.request import quantity
from shoal.cluster.plan.devices import parse_machine
from shoal.cluster.plan.memory import HOST_RESERVED_BYTES
from shoal.cluster.plan.planner import Plan, Wish, make_plan
from shoal.errors import ConfigError

_GIB = 1 << 30
# Of a process that computes on a GPU: libraries, buffers that pass to the device, parts of shards that are being read.
_RANK_BYTES = 6 * _GIB
_SERVER_BYTES = 4 * _GIB
_RANK_CPUS, _SERVER_CPUS = 2, 2


@dataclasses.dataclass(frozen=True)
class PodPlan:
    """Degrees, pods and requests. why: a sentence.

    kv_cache_memory: bytes, on CPUs, where an engine would otherwise go by the memory of the whole machine.
    """

    tensor_size: int
    pipeline_size: int
    data_size: int
    pods_per_replica: int
    gpus_per_pod: int
    cpus: str
    memory: str
    kv_cache_memory: int | None
    why: str


def plan_pods(model: str, machine_text: str, *, max_model_len: int | None, shm_size: str) -> PodPlan:
    """machine_text: as `shoal plan --gpus` takes it, a pod for each node.

    Raises ModelError and ConfigError: the model cannot be read, or does not fit, or one pod would do.
    """
    machine = parse_machine(machine_text)
    plan = make_plan(Wish(model=model, max_model_len=max_model_len), machine)
    if plan.choice is None:
        raise ConfigError(f"{model} fits {machine.describe()} in no layout; `shoal plan` says what would do")
    layout = plan.choice.candidate.layout
    if machine.num_nodes > 1 and layout.num_nodes < machine.num_nodes or layout.way == "servers":
        needed = 1 if layout.way == "servers" else layout.num_nodes
        raise ConfigError(
            f"{needed} of the {machine.num_nodes} machines of {machine_text} would do for one server of the model: "
            "give the machines that one replica needs, and --replicas"
        )
    per_pod = layout.num_ranks // machine.num_nodes
    return PodPlan(
        tensor_size=layout.tensor_size,
        pipeline_size=layout.pipeline_size,
        data_size=layout.data_size,
        pods_per_replica=machine.num_nodes,
        gpus_per_pod=0 if machine.device.is_cpu else machine.per_node,
        cpus=str(machine.device.cores or _SERVER_CPUS + _RANK_CPUS * per_pod),
        memory=f"{math.ceil((_bytes(plan, per_pod) + quantity(shm_size, '--shm-size')) / _GIB)}Gi",
        kv_cache_memory=plan.choice.candidate.memory.cache if machine.device.is_cpu else None,
        why=f"{layout.name} on {machine.describe()}: {plan.choice.reason}",
    )


def _bytes(plan: Plan, ranks: int) -> int:
    """Of host memory that a pod needs."""
    assert plan.choice is not None
    if plan.machine.device.is_cpu:
        return HOST_RESERVED_BYTES + ranks * plan.choice.candidate.memory.budget
    return _SERVER_BYTES + ranks * _RANK_BYTES
