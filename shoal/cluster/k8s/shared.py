"""Objects that several forms have: the Secret, volumes, Services, the router, disruption budgets, the autoscaler."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from shoal.cluster.k8s import pods
from shoal.cluster.k8s.pods import Manifest
from shoal.cluster.k8s.request import LEAVE_SECONDS, S3_DRIVER, RenderRequest

SERVER, ROUTER = "server", "router"
# Requests that may wait on each server before there are more of them.
_TARGET_WAITING = "2"
_WAITING_METRIC = "shoal_num_requests_waiting"
_SETTLE_SECONDS = 300
_ROUTER_START_SECONDS = 60
_ROUTER_RESOURCES = {"requests": {"cpu": "1", "memory": "512Mi"}, "limits": {"memory": "2Gi"}}
_FINDER_RESOURCES = {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "128Mi"}}
_ROUTER_FILE = "/config/router.yaml"


def secret(request: RenderRequest) -> list[Manifest]:
    """Fresh values; nothing where the request names a Secret that exists."""
    if request.existing_secret is not None:
        return []
    token = secrets.token_hex(32)
    values = {"cluster-token": token, "api-key": secrets.token_hex(24), "admin-key": secrets.token_hex(24)}
    if request.form == "rayservice":
        values["auth_token"] = token  # the name that KubeRay looks for
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": pods.metadata(request, request.secret_name, "secret"),
            "type": "Opaque",
            "stringData": values,
        }
    ]


def storage(request: RenderRequest) -> list[Manifest]:
    """The claim on models, and for a bucket the volume."""
    wanted = request.storage
    name = f"{request.name}-models"
    claim: Manifest = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": pods.metadata(request, name, "models"),
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": wanted.size}}},
    }
    if wanted.kind == "storage_class":
        claim["spec"]["storageClassName"] = wanted.storage_class
        return [claim]
    if wanted.kind != "bucket":
        return []
    volume_name = f"{request.namespace}-{name}"  # volumes belong to no namespace
    # An empty class: the claim is for this volume, and nothing is to be made for it.
    claim["spec"] |= {"accessModes": ["ReadOnlyMany"], "storageClassName": "", "volumeName": volume_name}
    volume: Manifest = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": volume_name, "labels": pods.labels(request, "models")},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "capacity": {"storage": wanted.size},
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "claimRef": {"name": name, "namespace": request.namespace},
            "csi": _csi(request),
        },
    }
    if options := _mount_options(request):
        volume["spec"]["mountOptions"] = options
    return [volume, claim]


def _csi(request: RenderRequest) -> Manifest:
    wanted = request.storage
    assert wanted.bucket is not None
    attributes = dict(wanted.attributes)
    if wanted.driver == S3_DRIVER:
        attributes.setdefault("bucketName", wanted.bucket)
    elif wanted.bucket_endpoint is not None:
        attributes.setdefault("url", wanted.bucket_endpoint)
        attributes.setdefault("bucket", wanted.bucket)
    else:
        attributes.setdefault("bucket", wanted.bucket)
    csi: Manifest = {
        "driver": wanted.driver,
        # The same bucket may be mounted by others, in other ways: drivers tell volumes apart by this.
        "volumeHandle": f"{request.namespace}-{request.name}-{wanted.bucket}",
        "readOnly": True,
        "volumeAttributes": attributes,
    }
    if wanted.bucket_secret is not None:
        reference = {"name": wanted.bucket_secret, "namespace": request.namespace}
        csi |= {"nodePublishSecretRef": reference, "nodeStageSecretRef": reference}
    return csi


def _mount_options(request: RenderRequest) -> list[str]:
    """Mountpoint for S3 takes all but the bucket from here; `allow-other`, since the pod's user is not root."""
    wanted = request.storage
    options = list(wanted.mount_options)
    if wanted.driver == S3_DRIVER:
        options += ["allow-other", "read-only"]
        if wanted.bucket_region is not None:
            options.append(f"region {wanted.bucket_region}")
        if wanted.bucket_endpoint is not None:
            options += [f"endpoint-url {wanted.bucket_endpoint}", "force-path-style"]
        if wanted.bucket_prefix is not None:
            options.append(f"prefix {wanted.bucket_prefix.rstrip('/')}/")
    return options


def server_service(request: RenderRequest, selected: Mapping[str, str]) -> Manifest:
    """A name for the addresses of all servers, ready or not: the router finds out for itself how they are."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": pods.metadata(request, f"{request.name}-servers", SERVER),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": dict(selected),
            "ports": [{"name": "http", "port": request.port, "targetPort": request.port}],
        },
    }


def entrance_service(request: RenderRequest, selected: Mapping[str, str]) -> Manifest:
    """What clients use: the router, or the servers where there is none."""
    port = request.router_port if request.router else request.port
    target = pods.labels(request, ROUTER) if request.router else dict(selected)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": pods.metadata(request, request.name, "entrance"),
        "spec": {"selector": target, "ports": [{"name": "http", "port": 80, "targetPort": port}]},
    }


def disruption_budget(request: RenderRequest, component: str, selected: Mapping[str, str]) -> Manifest:
    """At most one of these goes at a time when machines are emptied."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": pods.metadata(request, f"{request.name}-{component}s", component),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": dict(selected)}},
    }


def autoscaler(request: RenderRequest, api_version: str, kind: str) -> list[Manifest]:
    """By requests that wait: the load of a GPU says nothing about them. The metric comes by a metrics adapter."""
    if request.max_replicas is None:
        return []
    waiting = {"metric": {"name": _WAITING_METRIC}, "target": {"type": "AverageValue", "averageValue": _TARGET_WAITING}}
    return [
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": pods.metadata(request, f"{request.name}-servers", SERVER),
            "spec": {
                "scaleTargetRef": {"apiVersion": api_version, "kind": kind, "name": f"{request.name}-server"},
                "minReplicas": request.replicas,
                "maxReplicas": request.max_replicas,
                "metrics": [{"type": "Pods", "pods": waiting}],
                "behavior": {"scaleDown": {"stabilizationWindowSeconds": _SETTLE_SECONDS}},
            },
        }
    ]


def router(request: RenderRequest) -> list[Manifest]:
    """The router and its budget. Beside it runs what writes the servers' addresses into its file."""
    if not request.router:
        return []
    own = pods.labels(request, ROUTER)
    file_mount = {"name": "config", "mountPath": "/config"}
    environment = [
        pods.secret_value(request, "SHOAL_CLUSTER_TOKEN", "cluster-token"),
        pods.secret_value(request, "SHOAL_API_KEY", "api-key"),
        pods.secret_value(request, "SHOAL_BACKEND_API_KEY", "api-key"),
        pods.secret_value(request, "SHOAL_ADMIN_KEY", "admin-key"),
        {"name": "HOME", "value": "/home/shoal"},
    ]
    finder = {
        "name": "find-servers",
        "image": request.image,
        "command": ["python", "-m", "shoal.cluster.k8s.backends"],
        "args": [f"{request.name}-servers.{request.namespace}.svc", str(request.port), _ROUTER_FILE],
        "restartPolicy": "Always",  # an init container that stays: the router starts once this one's probe is well
        "startupProbe": {
            "exec": {"command": ["test", "-s", _ROUTER_FILE]},
            "periodSeconds": 1,
            "failureThreshold": request.start_seconds,
        },
        "env": [{"name": "HOME", "value": "/home/shoal"}],
        "resources": _FINDER_RESOURCES,
        "securityContext": pods.container_security(),
        "volumeMounts": [file_mount, *pods.writable_mounts()],
    }
    container = {
        "name": "router",
        "image": request.image,
        "command": ["shoal", "router"],
        "args": [
            f"--config={_ROUTER_FILE}",
            "--host=0.0.0.0",
            f"--port={request.router_port}",
            f"--shutdown-timeout={request.drain_seconds}",
        ],
        "env": environment,
        "ports": [{"name": "http", "containerPort": request.router_port}],
        **pods.probes(request.router_port, _ROUTER_START_SECONDS),
        "lifecycle": pods.leave_slowly(),
        "resources": _ROUTER_RESOURCES,
        "securityContext": pods.container_security(),
        "volumeMounts": [{**file_mount, "readOnly": True}, *pods.writable_mounts()],
    }
    spec: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pods.pod_security(request),
        "affinity": _preferably_apart(own),
        "initContainers": [finder],
        "containers": [container],
        "volumes": [{"name": "config", "emptyDir": {}}, *pods.writable_volumes()],
        "terminationGracePeriodSeconds": LEAVE_SECONDS + request.drain_seconds + 5,
    }
    if request.image_pull_secret is not None:
        spec["imagePullSecrets"] = [{"name": request.image_pull_secret}]
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": pods.metadata(request, f"{request.name}-router", ROUTER),
        "spec": {
            "replicas": request.router_replicas,
            "selector": {"matchLabels": own},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {
                "metadata": {"labels": own, "annotations": pods.scraped(request.router_port)},
                "spec": spec,
            },
        },
    }
    return [deployment, disruption_budget(request, ROUTER, own)]


def _preferably_apart(selected: Mapping[str, str]) -> Manifest:
    term = {"labelSelector": {"matchLabels": dict(selected)}, "topologyKey": "kubernetes.io/hostname"}
    preferred = [{"weight": 100, "podAffinityTerm": term}]
    return {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
