"""The forms of a rendering, by name: which objects a request becomes, in the order in which they are applied."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import yaml

from shoal.cluster.k8s import pods, shared
from shoal.cluster.k8s.pods import Manifest
from shoal.cluster.k8s.request import RenderRequest
from shoal.errors import ConfigError

_LWS_API = "leaderworkerset.x-k8s.io/v1"
_RAY_API = "ray.io/v1"
_LEADER_LABELS = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}
_SERVE_APP = "shoal.cluster.k8s.serve_app:build"
_HEAD_RESOURCES = {"requests": {"cpu": "2", "memory": "8Gi"}, "limits": {"memory": "8Gi"}}


def render(request: RenderRequest) -> list[Manifest]:
    """All objects of a request."""
    return [*shared.secret(request), *shared.storage(request), *_FORMS[request.form](request)]


def _server_container(request: RenderRequest, arguments: list[str]) -> Manifest:
    return {
        "name": "server",
        "image": request.image,
        "command": ["shoal", "serve"],
        "args": [*pods.serve_arguments(request), *pods.listen_arguments(request), *arguments],
        "env": pods.environment(request),
        "ports": [{"name": "http", "containerPort": request.port}],
        **pods.probes(request.port, request.start_seconds),
        "lifecycle": pods.leave_slowly(),
        "resources": pods.resources(request),
        "securityContext": pods.container_security(),
        "volumeMounts": pods.mounts(request),
    }


def _apart(request: RenderRequest, selected: dict[str, str]) -> Manifest | None:
    return pods.one_a_host(selected) if request.one_pod_per_host else None


# --- plain Deployments -----------------------------------------------------------------------------------------------


def _deployment(request: RenderRequest) -> list[Manifest]:
    """A pod a replica."""
    own = pods.labels(request, shared.SERVER)
    several = ["--distributed-executor-backend=mp"] if request.world_size > 1 else []
    deployment: Manifest = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": pods.metadata(request, f"{request.name}-server", shared.SERVER),
        "spec": {
            "replicas": request.replicas,
            "selector": {"matchLabels": own},
            # GPUs are rarely free for one pod more: an old one goes first.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}},
            "progressDeadlineSeconds": request.start_seconds + request.grace_seconds,
            "template": {
                "metadata": {"labels": own, "annotations": pods.scraped(request.port)},
                "spec": pods.pod_spec(request, [_server_container(request, several)], _apart(request, own)),
            },
        },
    }
    if request.max_replicas is not None:
        del deployment["spec"]["replicas"]  # the autoscaler's: applying the file again must not take it back
    return [
        deployment,
        shared.server_service(request, own),
        shared.disruption_budget(request, shared.SERVER, own),
        *shared.router(request),
        shared.entrance_service(request, own),
        *shared.autoscaler(request, "apps/v1", "Deployment"),
    ]


# --- LeaderWorkerSet -------------------------------------------------------------------------------------------------


def _lws(request: RenderRequest) -> list[Manifest]:
    """A group of pods a replica: the leader serves, the others run ranks for it (--nnodes)."""
    own = pods.labels(request, shared.SERVER)
    leaders = {**own, **_LEADER_LABELS}
    affinity = _apart(request, own)

    def meeting(rank: str, master: str) -> list[str]:
        several = [f"--nnodes={request.pods_per_replica}", f"--node-rank={rank}", f"--master-addr={master}"]
        return several if request.pods_per_replica > 1 else ["--distributed-executor-backend=mp"]

    # The leader's own name need not resolve yet when it starts; its address is known.
    leader = _server_container(request, meeting("0", "$(SHOAL_HOST_IP)"))
    worker = _server_container(request, meeting("$(LWS_WORKER_INDEX)", "$(LWS_LEADER_ADDRESS)"))
    # What is no leader answers no HTTP. It ends with its engine, and the group is made anew.
    for name in ("startupProbe", "readinessProbe", "livenessProbe", "ports", "lifecycle"):
        del worker[name]

    def template(container: Manifest, annotations: dict[str, str] | None) -> Manifest:
        about: Manifest = {"labels": own} | ({"annotations": annotations} if annotations else {})
        return {"metadata": about, "spec": pods.pod_spec(request, [container], affinity)}

    group: Manifest = {
        "apiVersion": _LWS_API,
        "kind": "LeaderWorkerSet",
        "metadata": pods.metadata(request, f"{request.name}-server", shared.SERVER),
        "spec": {
            "replicas": request.replicas,
            "startupPolicy": "LeaderCreated",
            "rolloutStrategy": {
                "type": "RollingUpdate",
                "rollingUpdateConfiguration": {"maxUnavailable": 1, "maxSurge": 0},
            },
            "leaderWorkerTemplate": {
                "size": request.pods_per_replica,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": template(leader, pods.scraped(request.port)),
                "workerTemplate": template(worker, None),
            },
        },
    }
    if request.max_replicas is not None:
        del group["spec"]["replicas"]
    return [
        group,
        shared.server_service(request, leaders),
        shared.disruption_budget(request, shared.SERVER, leaders),
        *shared.router(request),
        shared.entrance_service(request, leaders),
        *shared.autoscaler(request, _LWS_API, "LeaderWorkerSet"),
    ]


# --- KubeRay ---------------------------------------------------------------------------------------------------------


def _rayservice(request: RenderRequest) -> list[Manifest]:
    """A Ray cluster with an application of Ray Serve, each replica of which starts a server and hands requests on.

    KubeRay sets the command of these containers (`ray start`), probes included.
    """
    own = pods.labels(request, shared.SERVER)

    def container(name: str, resources: Manifest, ports: dict[str, int]) -> Manifest:
        return {
            "name": name,
            "image": request.image,
            "env": pods.environment(request),
            "ports": [{"name": each, "containerPort": number} for each, number in ports.items()],
            "resources": resources,
            "securityContext": pods.container_security(),
            "volumeMounts": pods.mounts(request),
        }

    def template(containers: list[Manifest], affinity: Manifest | None) -> Manifest:
        return {"metadata": {"labels": own}, "spec": pods.pod_spec(request, containers, affinity)}

    head_ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "serve": request.port}
    head = template([container("ray-head", _HEAD_RESOURCES, head_ports)], None)
    for name in ("tolerations", "nodeSelector", "runtimeClassName"):
        head["spec"].pop(name, None)  # it runs no ranks
    workers = template(
        [container("ray-worker", pods.resources(request), {"serve": request.port})], _apart(request, own)
    )
    num_workers = request.replicas * request.pods_per_replica
    cluster: Manifest = {
        "rayVersion": request.ray_version or _own_ray_version(),
        # The token is that of the Secret, so that Ray and Shoal's own connections have one.
        "authOptions": {"mode": "token", "secretName": request.secret_name},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
            "template": head,
        },
        "workerGroupSpecs": [
            {
                "groupName": "ranks",
                "replicas": num_workers,
                "minReplicas": num_workers,
                "maxReplicas": num_workers,
                "rayStartParams": {},
                "template": workers,
            }
        ],
    }
    return [
        {
            "apiVersion": _RAY_API,
            "kind": "RayService",
            "metadata": pods.metadata(request, request.name, shared.SERVER),
            "spec": {
                "serveConfigV2": yaml.safe_dump(_serve_config(request), sort_keys=False),
                "rayClusterConfig": cluster,
            },
        }
    ]


def _serve_config(request: RenderRequest) -> Manifest:
    spread = request.pods_per_replica > 1
    flags = pods.serve_arguments(request)
    flags += ["--distributed-executor-backend=ray"] if spread else []
    flags += [f"--shutdown-timeout={request.drain_seconds}"]
    arguments = {
        "flags": flags,
        "replicas": request.replicas,
        # Ranks on several pods get their GPUs from Ray one by one; those of one pod get them with their server.
        "num_gpus": 0 if spread else request.gpus_per_pod,
        "num_cpus": 1 if spread or request.gpus_per_pod else request.world_size,
        "needs_ray": spread,
        "start_seconds": request.start_seconds,
        "drain_seconds": request.drain_seconds,
    }
    application = {"name": request.name, "route_prefix": "/", "import_path": _SERVE_APP, "args": arguments}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": request.port},
        "applications": [application],
    }


def _own_ray_version() -> str:
    try:
        return importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "which Ray has the image? --ray-version says it (KubeRay wants to know); Ray is not installed here to ask"
        ) from None


_FORMS: dict[str, Callable[[RenderRequest], list[Manifest]]] = {
    "deployment": _deployment,
    "rayservice": _rayservice,
    "lws": _lws,
}
