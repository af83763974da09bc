"""What `shoal deploy status` shows, of what the controller remembers and what it saw last."""

from __future__ import annotations

from collections.abc import Mapping

from shoal.cluster.deploy.picture import Picture
from shoal.cluster.deploy.records import (
    Deployment,
    DeployStatus,
    ModelRecord,
    ModelStatus,
    ReplicaRecord,
    ReplicaStatus,
)

_ROUTER_EARLY_ENDS = 3


def describe(
    state: Deployment, picture: Picture, settled: Mapping[str, bool], now: float, *, stopped: bool
) -> DeployStatus:
    """settled: of each model, whether nothing is under way. stopped: nothing is left of the deployment."""
    router = picture.router
    failure = ""
    if router is not None and not router.was_ready and router.num_early_ends >= _ROUTER_EARLY_ENDS:
        failure = f"the router does not come up: {router.why}"
    models = []
    for name, record in state.models.items():
        model = _model(name, record, state.stopping)
        model.settled = settled.get(name, False)
        model.replicas = [_replica(each, picture, now) for each in state.replicas.values() if each.model == name]
        models.append(model)
    return DeployStatus(
        router_url=router.url if router is not None else None,
        router_state=router.state if router is not None else "not started",
        router_pid=router.pid if router is not None else None,
        models=models,
        stopping=state.stopping,
        stopped=stopped,
        owns_node=state.owns_node,
        failure=failure,
    )


def _model(name: str, record: ModelRecord, stopping: bool) -> ModelStatus:
    plan = record.plan
    return ModelStatus(
        name=name,
        revision=plan.revision if plan is not None else "",
        wanted=record.history.wanted if plan is not None and not stopping else 0,
        min=plan.replicas.min if plan is not None else 0,
        max=plan.replicas.max if plan is not None else 0,
        why=record.why,
        settled=False,
        failure=record.failure,
    )


def _replica(record: ReplicaRecord, picture: Picture, now: float) -> ReplicaStatus:
    report = picture.report(record.name)
    is_up = record.phase == "up"
    return ReplicaStatus(
        name=record.name,
        revision=record.revision,
        state=report.state if is_up else record.phase,
        why=picture.why_not(record) if is_up else record.why,
        node=report.node,
        url=report.url,
        pid=report.pid,
        uptime=now - report.started if report.started is not None else None,
        restarts=report.num_restarts,
        waiting=report.waiting,
        running=report.running,
        kv_usage=report.kv_usage,
        in_router=picture.is_serving(record),
    )
