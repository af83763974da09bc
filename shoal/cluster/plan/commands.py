"""The commands that bring a layout up, as they are typed."""

from __future__ import annotations

import shlex

from shoal.cluster.plan.devices import Machine
from shoal.cluster.plan.memory import Load
from shoal.cluster.plan.placement import Layout
from shoal.config.model_config import SUPPORTED_ARCHITECTURES

_DEFAULT_UTILIZATION = 0.9
_DEFAULT_NUM_SEQS = {True: 64, False: 256}  # on CPUs, on GPUs


def serve_flags(layout: Layout, load: Load, machine: Machine, *, checkpoint_dtype: str) -> list[str]:
    """Of `shoal serve`, without the model. data_parallel_size is that of one server."""
    flags: list[str] = []
    for name, size in (
        ("tensor", layout.tensor_size),
        ("pipeline", layout.pipeline_size),
        ("data", _per_server(layout)),
    ):
        if size > 1:
            flags += [f"--{name}-parallel-size", str(size)]
    if layout.way == "ray":
        flags += ["--distributed-executor-backend", "ray"]
    if layout.shares_experts:
        flags.append("--enable-expert-parallel")
    flags += ["--max-model-len", str(load.max_model_len)]
    if load.dtype != checkpoint_dtype:
        flags += ["--dtype", load.dtype]
    if load.num_seqs != _DEFAULT_NUM_SEQS[machine.device.is_cpu]:
        flags += ["--max-num-seqs", str(load.num_seqs)]
    if load.utilization != _DEFAULT_UTILIZATION and not machine.device.is_cpu:
        flags += ["--gpu-memory-utilization", f"{load.utilization:g}"]
    if load.kv_dtype != load.dtype:
        flags += ["--kv-cache-dtype", load.kv_dtype]
    return flags


def _per_server(layout: Layout) -> int:
    return layout.data_size // layout.num_nodes if layout.way == "servers" else layout.data_size


def commands(model: str, layout: Layout, load: Load, machine: Machine, *, checkpoint_dtype: str) -> list[str]:
    """In the order in which they are typed; a comment says where, if on several machines."""
    flags = serve_flags(layout, load, machine, checkpoint_dtype=checkpoint_dtype)
    serve = shlex.join(["shoal", "serve", model, *flags])
    if layout.way == "one":
        return [serve]
    if layout.way == "ray":
        return [
            "shoal node start --head    # on one of the machines; it prints the next line",
            f"SHOAL_CLUSTER_TOKEN=… shoal node start --address HEAD:6379    # on each of the others "
            f"({layout.num_nodes - 1})",
            f"{serve}    # on the head",
        ]
    nodes = [*machine.names[: layout.num_nodes]] or [f"NODE{index + 1}" for index in range(layout.num_nodes)]
    backends = " ".join(f"http://{node}:8000" for node in nodes)
    return [
        f"{serve} --host 0.0.0.0 --api-key KEY    # on each of {layout.num_nodes} machines",
        f"shoal router --backend-api-key KEY --backend {backends}    # on one of them",
    ]


def obstacles(architecture: str, layout: Layout | None) -> list[str]:
    """What of this the version at hand does not serve, or slower than the plan says; a plan promises no server."""
    found = []
    if architecture not in SUPPORTED_ARCHITECTURES:
        found.append(
            f"{architecture} has no code of its own here: it is served through Transformers where that can be "
            "(docs/models.md), and takes longer than the plan says"
        )
    if layout is not None and layout.shares_experts and (layout.in_lockstep or _per_server(layout) > 1):
        found.append(
            "experts that replicas share cannot be served in this version: the ranks of one replica share them"
        )
    return found
