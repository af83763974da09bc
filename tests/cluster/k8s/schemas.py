"""Whether manifests are what an API server would take: Kubernetes' own published schemas, strict (unknown fields are
wrong), and for custom resources the fields that their definitions have and require."""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

import jsonschema
import kubernetes_validate
from referencing import Registry, Resource

# The oldest with containers that start before others and stay, and the newest that is known.
VERSIONS = ("1.29.0", kubernetes_validate.latest_version())

_INT_OR_PERCENT = {"oneOf": [{"type": "integer"}, {"type": "string", "pattern": "^[0-9]+%$"}]}


def _closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


_TEMPLATE = {"type": "object", "required": ["spec"]}  # checked by itself
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}

# leaderworkerset.x-k8s.io/v1, LeaderWorkerSetSpec.
_LWS = _closed(
    ["leaderWorkerTemplate"],
    replicas={"type": "integer", "minimum": 0},
    startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
    networkConfig=_closed(["subdomainPolicy"], subdomainPolicy={"enum": ["Shared", "UniquePerReplica"]}),
    rolloutStrategy=_closed(
        ["type"],
        type={"enum": ["RollingUpdate"]},
        rollingUpdateConfiguration=_closed(
            [], partition={"type": "integer"}, maxUnavailable=_INT_OR_PERCENT, maxSurge=_INT_OR_PERCENT
        ),
    ),
    leaderWorkerTemplate=_closed(
        ["workerTemplate"],
        leaderTemplate=_TEMPLATE,
        workerTemplate=_TEMPLATE,
        size={"type": "integer", "minimum": 1},
        restartPolicy={"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
        subGroupPolicy={"type": "object"},
    ),
)

# ray.io/v1, RayServiceSpec and the RayClusterSpec in it.
_RAY_CLUSTER = _closed(
    ["headGroupSpec"],
    rayVersion={"type": "string"},
    enableInTreeAutoscaling={"type": "boolean"},
    authOptions=_closed([], mode={"enum": ["disabled", "token"]}, secretName={"type": "string"}),
    headGroupSpec=_closed(
        ["template"],
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        enableIngress={"type": "boolean"},
        rayStartParams=_STRINGS,
        template=_TEMPLATE,
    ),
    workerGroupSpecs={
        "type": "array",
        "minItems": 1,
        "items": _closed(
            ["groupName", "maxReplicas", "minReplicas", "template"],
            groupName={"type": "string"},
            replicas={"type": "integer"},
            minReplicas={"type": "integer"},
            maxReplicas={"type": "integer"},
            numOfHosts={"type": "integer", "minimum": 1},
            rayStartParams=_STRINGS,
            template=_TEMPLATE,
        ),
    },
)
_RAY_SERVICE = _closed(
    [], serveConfigV2={"type": "string"}, rayClusterConfig=_RAY_CLUSTER, serveService={"type": "object"}
)
CUSTOM = {
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): _LWS,
    ("ray.io/v1", "RayService"): _RAY_SERVICE,
}


def check(manifest: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError for what would be refused."""
    custom = CUSTOM.get((manifest["apiVersion"], manifest["kind"]))
    if custom is None:
        for version in VERSIONS:
            _published(version, manifest["kind"], manifest["apiVersion"]).validate(manifest)
        return
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    jsonschema.Draft202012Validator(custom).validate(manifest["spec"])
    templates = list(pod_templates(manifest))
    assert templates
    for template in templates:
        check(_wrapped(template, manifest["metadata"]))


@functools.cache
def _published(version: str, kind: str, api_version: str) -> jsonschema.Draft202012Validator:
    """The package has the schemas; its own function reads megabytes of them anew for each object."""
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}-local-strict"
    group = api_version.split("/")[0].split(".")[0]
    suffix = f"{group}-{api_version.split('/')[1]}" if "/" in api_version else api_version
    schema = json.loads((folder / f"{kind.lower()}-{suffix}.json").read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator(schema, registry=_definitions(version))


@functools.cache
def _definitions(version: str) -> Registry:
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}-local-strict"
    contents = json.loads((folder / "_definitions.json").read_text(encoding="utf-8"))
    return Resource.from_contents(contents) @ Registry()


def pod_templates(node: Any) -> list[dict[str, Any]]:
    """Everything below that has containers."""
    if isinstance(node, list):
        return [found for each in node for found in pod_templates(each)]
    if not isinstance(node, dict):
        return []
    if "containers" in node.get("spec", {}):
        return [node]
    return [found for each in node.values() for found in pod_templates(each)]


def _wrapped(template: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    labels = template["metadata"]["labels"]
    spec = {"selector": {"matchLabels": labels}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec}
