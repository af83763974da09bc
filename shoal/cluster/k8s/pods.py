"""The parts that pods of all forms are made of: the server's container, its probes, volumes and rights."""

from __future__ import annotations

from typing import Any

from shoal.cluster.k8s.request import LEAVE_SECONDS, MODEL_MOUNT, RenderRequest

Manifest = dict[str, Any]

# A server answers these at once unless its machine is out of breath.
_PROBE_TIMEOUT_SECONDS = 5
_READY_PERIOD_SECONDS = 5
_LIVE_PERIOD_SECONDS = 10
# A server that stalls ends its engine and starts it again by itself, within seconds; the pod is for when that fails.
_LIVE_FAILURES = 6
_READY_FAILURES = 2
_HOME = "/home/shoal"


def labels(request: RenderRequest, component: str) -> dict[str, str]:
    """Also what selects: nothing of it changes between renderings."""
    return {
        "app.kubernetes.io/name": "shoal",
        "app.kubernetes.io/instance": request.name,
        "app.kubernetes.io/component": component,
    }


def metadata(request: RenderRequest, name: str, component: str, **more: Any) -> Manifest:
    return {"name": name, "namespace": request.namespace, "labels": labels(request, component), **more}


def secret_value(request: RenderRequest, variable: str, key: str) -> Manifest:
    """An environment variable out of the Secret."""
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": request.secret_name, "key": key}}}


def own_address(variable: str = "SHOAL_HOST_IP") -> Manifest:
    return {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}


def environment(request: RenderRequest) -> list[Manifest]:
    """Of every container that runs ranks."""
    return [
        own_address(),
        secret_value(request, "SHOAL_CLUSTER_TOKEN", "cluster-token"),
        secret_value(request, "SHOAL_API_KEY", "api-key"),
        {"name": "HOME", "value": _HOME},
        {"name": "SHOAL_CACHE_DIR", "value": f"{_HOME}/.cache/shoal"},
    ]


def serve_arguments(request: RenderRequest) -> list[str]:
    """Of `shoal serve`, but for where it listens and how several pods meet."""
    arguments = [request.model]
    arguments += [f"--served-model-name={name}" for name in request.served_model_name]
    degrees = {"tensor": request.tensor_size, "pipeline": request.pipeline_size, "data": request.data_size}
    arguments += [f"--{axis}-parallel-size={size}" for axis, size in degrees.items() if size > 1]
    if request.max_model_len is not None:
        arguments.append(f"--max-model-len={request.max_model_len}")
    arguments.append(f"--device={'cuda' if request.gpus_per_pod else 'cpu'}")
    return [*arguments, *request.serve_arguments]


def listen_arguments(request: RenderRequest) -> list[str]:
    return ["--host=0.0.0.0", f"--port={request.port}", f"--shutdown-timeout={request.drain_seconds}"]


def resources(request: RenderRequest) -> Manifest:
    """Memory is a limit, too: a pod over it ends before others do. CPUs are none: that would only throttle."""
    limits: Manifest = {"memory": request.memory}
    if request.gpus_per_pod:
        limits[request.gpu_resource] = request.gpus_per_pod
    return {"requests": {"cpu": request.cpus, **limits}, "limits": limits}


def probes(port: int, start_seconds: int) -> Manifest:
    """Ready: new requests are taken. Live: the engine is there and gets on. Until it has been ready once, only the time
    of the start counts."""

    def get(path: str, period: int, failures: int) -> Manifest:
        return {
            "httpGet": {"path": path, "port": port},
            "periodSeconds": period,
            "timeoutSeconds": _PROBE_TIMEOUT_SECONDS,
            "failureThreshold": failures,
        }

    return {
        "startupProbe": get("/readyz", _READY_PERIOD_SECONDS, max(1, start_seconds // _READY_PERIOD_SECONDS)),
        "readinessProbe": get("/readyz", _READY_PERIOD_SECONDS, _READY_FAILURES),
        "livenessProbe": get("/livez", _LIVE_PERIOD_SECONDS, _LIVE_FAILURES),
    }


def leave_slowly() -> Manifest:
    """SIGTERM drains a server or router; it comes when Services and routers have heard that the pod goes."""
    return {"preStop": {"exec": {"command": ["sleep", str(LEAVE_SECONDS)]}}}


def container_security() -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def pod_security(request: RenderRequest) -> Manifest:
    return {
        "runAsNonRoot": True,
        "runAsUser": request.user_id,
        "runAsGroup": request.user_id,
        "fsGroup": request.user_id,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def writable_mounts() -> list[Manifest]:
    """The root file system is read-only."""
    return [{"name": "home", "mountPath": _HOME}, {"name": "tmp", "mountPath": "/tmp"}]


def mounts(request: RenderRequest) -> list[Manifest]:
    found = [{"name": "shm", "mountPath": "/dev/shm"}, *writable_mounts()]
    if request.storage.kind is not None:
        found.insert(0, {"name": "models", "mountPath": MODEL_MOUNT, "readOnly": True})
    return found


def writable_volumes() -> list[Manifest]:
    return [{"name": "home", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}]


def volumes(request: RenderRequest) -> list[Manifest]:
    found = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": request.shm_size}}, *writable_volumes()]
    if request.storage.host_path is not None:
        source: Manifest = {"hostPath": {"path": request.storage.host_path, "type": "Directory"}}
        found.insert(0, {"name": "models", **source})
    elif request.storage.kind is not None:
        claim = request.storage.claim or f"{request.name}-models"
        found.insert(0, {"name": "models", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
    return found


def one_a_host(selected: dict[str, str]) -> Manifest:
    """Pods with these labels go to different machines."""
    term = {"labelSelector": {"matchLabels": selected}, "topologyKey": "kubernetes.io/hostname"}
    return {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def pod_spec(request: RenderRequest, containers: list[Manifest], anti_affinity: Manifest | None) -> Manifest:
    """Of pods that run ranks."""
    spec: Manifest = {
        "automountServiceAccountToken": False,
        # Variables that Kubernetes makes of Services could be taken for Shoal's own.
        "enableServiceLinks": False,
        "securityContext": pod_security(request),
        "containers": containers,
        "volumes": volumes(request),
        "terminationGracePeriodSeconds": request.grace_seconds,
    }
    if anti_affinity is not None:
        spec["affinity"] = anti_affinity
    if request.node_selector:
        spec["nodeSelector"] = dict(request.node_selector)
    if request.gpus_per_pod:
        spec["tolerations"] = [{"key": request.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}]
    if request.runtime_class is not None:
        spec["runtimeClassName"] = request.runtime_class
    if request.image_pull_secret is not None:
        spec["imagePullSecrets"] = [{"name": request.image_pull_secret}]
    return spec


def scraped(port: int) -> dict[str, str]:
    """Annotations by which Prometheus, as it is often set up, finds /metrics."""
    return {"prometheus.io/scrape": "true", "prometheus.io/port": str(port), "prometheus.io/path": "/metrics"}
