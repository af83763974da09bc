"""`shoal k8s render`: manifests for Kubernetes, as YAML."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from shoal.cli.command import Command, CommandGroup
from shoal.cli.k8s_options import K8S_SECTIONS, K8sModelOptions, K8sOptions, K8sPodOptions, K8sStorageOptions
from shoal.cluster.k8s.forms import render
from shoal.cluster.k8s.output import to_yaml, write_files
from shoal.cluster.k8s.planned import PodPlan, plan_pods
from shoal.cluster.k8s.request import RenderRequest, Storage, pairs
from shoal.config.flags import spell_flag
from shoal.config.options import EMBEDDED_MODEL
from shoal.errors import ConfigError

_PLANNED = (
    "gpus_per_pod", "pods_per_replica", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"
)  # fmt: skip


def _render(what: K8sOptions, model: K8sModelOptions, storage: K8sStorageOptions, pod: K8sPodOptions) -> int:
    manifests = render(_request(what, model, storage, pod))
    if what.output is None:
        print(to_yaml(manifests), end="")
        return 0
    for line in write_files(manifests, Path(what.output).expanduser()):
        print(line)
    print(f"kubectl apply -f {what.output}", file=sys.stderr)
    return 0


def _request(what: K8sOptions, model: K8sModelOptions, storage: K8sStorageOptions, pod: K8sPodOptions) -> RenderRequest:
    if model.model is None:
        raise ConfigError("which model? --model /models/NAME (with --bucket, --claim, …), or --model shoal-tiny")
    if what.image is None:
        raise ConfigError("which image? --image REGISTRY/shoal:TAG, built by deploy/docker/Dockerfile (or .cuda)")
    planned = _planned(model, pod) if model.gpus is not None else None
    arguments = list(model.serve_arg)
    if planned is not None:
        print(planned.why, file=sys.stderr)
        if planned.kv_cache_memory is not None and not any("kv-cache-memory" in each for each in arguments):
            arguments.append(f"--kv-cache-memory={planned.kv_cache_memory}")
    given = dataclasses.asdict(planned) if planned is not None else {}
    return RenderRequest(
        form=what.form,
        name=what.name,
        namespace=what.namespace,
        image=what.image,
        model=model.model,
        served_model_name=tuple(model.served_model_name),
        replicas=model.replicas,
        max_replicas=model.max_replicas,
        gpus_per_pod=_first(model.gpus_per_pod, given.get("gpus_per_pod"), 1),
        pods_per_replica=_first(model.pods_per_replica, given.get("pods_per_replica"), 1),
        tensor_size=_first(model.tensor_parallel_size, given.get("tensor_size"), 1),
        pipeline_size=_first(model.pipeline_parallel_size, given.get("pipeline_size"), 1),
        data_size=_first(model.data_parallel_size, given.get("data_size"), 1),
        max_model_len=model.max_model_len,
        serve_arguments=tuple(arguments),
        cpus=_first(pod.cpus, given.get("cpus"), "4"),
        memory=_first(pod.memory, given.get("memory"), "16Gi"),
        shm_size=pod.shm_size,
        port=pod.port,
        router=pod.router,
        router_replicas=pod.router_replicas,
        router_port=pod.router_port,
        drain_seconds=pod.drain_timeout,
        start_seconds=pod.start_timeout,
        one_pod_per_host=pod.one_pod_per_host,
        gpu_resource=pod.gpu_resource,
        node_selector=pairs(pod.node_selector, "--node-selector"),
        runtime_class=pod.runtime_class,
        image_pull_secret=what.image_pull_secret,
        existing_secret=what.existing_secret,
        user_id=pod.user_id,
        ray_version=pod.ray_version or "",
        storage=Storage(
            claim=storage.claim,
            storage_class=storage.storage_class,
            size=storage.volume_size,
            bucket=storage.bucket,
            bucket_prefix=storage.bucket_prefix,
            bucket_endpoint=storage.bucket_endpoint,
            bucket_region=storage.bucket_region,
            bucket_secret=storage.bucket_secret,
            driver=storage.csi_driver,
            attributes=pairs(storage.volume_attribute, "--volume-attribute"),
            mount_options=tuple(storage.mount_option),
            host_path=storage.host_path,
        ),
    )


def _planned(model: K8sModelOptions, pod: K8sPodOptions) -> PodPlan:
    assert model.gpus is not None and model.model is not None
    for name in _PLANNED:
        if getattr(model, name) is not None:
            raise ConfigError(f"{spell_flag(name)} and --gpus both say how ranks lie on pods; give one of them")
    source = model.config_from or model.model
    if model.config_from is None and model.model != EMBEDDED_MODEL and not Path(model.model).exists():
        raise ConfigError(
            f"a plan needs the model's config.json, and {model.model} is not on this machine: --config-from DIRECTORY "
            "says where it is here"
        )
    return plan_pods(source, model.gpus, max_model_len=model.max_model_len, shm_size=pod.shm_size)


def _first(*values: Any) -> Any:
    """The first that is given."""
    return next(value for value in values if value is not None)


COMMAND = CommandGroup(
    name="k8s",
    description="Shoal on Kubernetes.",
    commands=(
        Command(
            name="k8s render",
            description="Print manifests for a model's servers: Secret, storage, pods with probes and an orderly end, "
            "routers and Services; as plain Deployments, a KubeRay RayService or a LeaderWorkerSet.",
            sections=K8S_SECTIONS,
            positional="model",
            run=_render,
        ),
    ),
)
