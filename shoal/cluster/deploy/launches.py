"""What replicas and the router are started with, and what the router's file says: pure, from what is remembered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.cluster.deploy.fleet import router_file
from shoal.cluster.deploy.records import Deployment, Launch, ReplicaRecord
from shoal.config.deploy_file import ModelPlan
from shoal.config.options import ServerOptions

# After the server's own time to finish requests: for its engine to end.
_END_SECONDS = 10.0


def resources(plan: ModelPlan, *, has_gpus: bool) -> tuple[float, float]:
    """GPUs and CPUs that Ray sets apart for a replica's actor. Ranks that Ray places itself count there.

    has_gpus: whether the cluster has any; without, models run on CPUs unless the plan says otherwise.
    """
    layout = plan.layout
    if plan.is_spread:
        return layout.num_gpus or 0.0, 1.0 if layout.num_cpus is None else layout.num_cpus
    num_gpus = layout.num_gpus
    if num_gpus is None:
        on_gpus = {"cpu": False, "cuda": True}.get(plan.serve.get("device", "auto"), has_gpus)
        num_gpus = float(layout.world_size) if on_gpus else 0.0
    default = 1.0 if num_gpus else float(layout.world_size)
    return num_gpus, default if layout.num_cpus is None else layout.num_cpus


def replica_launch(state: Deployment, plan: ModelPlan, *, takes_gpus: bool) -> Launch:
    return Launch(
        program=state.program,
        flags=plan.flags(),
        variables={"SHOAL_API_KEY": state.api_key},
        takes_gpus=takes_gpus,
        needs_ray=plan.is_spread,
        grace=replica_grace(plan),
    )


def replica_grace(plan: ModelPlan | None) -> float:
    """Seconds from SIGTERM to SIGKILL."""
    return _grace(plan.serve if plan is not None else {})


def router_launch(state: Deployment) -> Launch:
    return Launch(program=state.router_program, flags=[], grace=_grace(state.plan.router.options))


def router_content(state: Deployment, urls: Mapping[str, str]) -> str | None:
    """The router's file, with these replicas (name -> URL); None without any: a router wants one at least.

    Servers are in it as soon as they have an address: the router lets them in when they are well.
    """
    replicas = [state.replicas[name] for name in urls]
    if not replicas:
        return None
    backends = [
        {"url": urls[each.name], "models": [each.model], "kind": "shoal", "api_key": state.api_key} for each in replicas
    ]
    content: dict[str, Any] = {**state.plan.router.options, **state.plan.router.lists, "backends": backends}
    if _are_mixed(replicas):
        content["golden_prompt"] = "off"  # another revision may well answer otherwise
    if state.admin_key is not None:
        content["admin_key"] = state.admin_key
    return router_file(content)


def _are_mixed(replicas: list[ReplicaRecord]) -> bool:
    revisions = {(each.model, each.revision) for each in replicas}
    return len(revisions) > len({each.model for each in replicas})


def _grace(options: Mapping[str, Any]) -> float:
    return _END_SECONDS + float(options.get("shutdown_timeout", ServerOptions.shutdown_timeout))
