"""Options of `shoal k8s render`."""

from __future__ import annotations

import dataclasses

from shoal.cluster.k8s.request import FORMS, S3_DRIVER
from shoal.config.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class K8sOptions:
    """What is rendered."""

    form: str = option("deployment", "Plain Deployments, a KubeRay RayService or a LeaderWorkerSet.", choices=FORMS)
    name: str = option("shoal", "Name of it all; objects are called after it.")
    namespace: str = option("default", "Namespace of all objects; it must exist.")
    output: str | None = option(None, "Directory for a file each; default: all to standard output.", short="o")
    image: str | None = option(None, "Container image with Shoal, such as deploy/docker/ makes.")
    image_pull_secret: str | None = option(None, "Secret that lets machines fetch the image.")
    existing_secret: str | None = option(
        None, "Secret with cluster-token, api-key and admin-key (rayservice: auth_token too); default: one is rendered."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class K8sModelOptions:
    """The model, and how many serve it."""

    model: str | None = option(None, "What is served, as the containers see it: below /models, or shoal-tiny.")
    served_model_name: list[str] = option([], "Names of the model in the API; default: the model argument.")
    replicas: int = option(1, "Servers of the model.", minimum=1)
    max_replicas: int | None = option(
        None, "As many at most, by requests that wait (a HorizontalPodAutoscaler).", minimum=1
    )
    gpus: str | None = option(
        None,
        "The machines of one replica, as for shoal plan: 4xH100-80, 2x4xL20-46GiB, cpu-16c-32GB. The layout, and what "
        "pods ask for, come from a plan.",
    )
    config_from: str | None = option(
        None, "With --gpus: directory of the model, or its config.json, on this machine; default: the model argument."
    )
    gpus_per_pod: int | None = option(None, "GPUs of a pod; 0: it computes on CPUs. Default: 1.", minimum=0)
    pods_per_replica: int | None = option(
        None, "Pods that one server's ranks are spread over (lws, rayservice). Default: 1.", minimum=1
    )
    tensor_parallel_size: int | None = option(None, "Ranks that share each layer. Default: 1.", short="tp", minimum=1)
    pipeline_parallel_size: int | None = option(None, "Pipeline stages. Default: 1.", short="pp", minimum=1)
    data_parallel_size: int | None = option(
        None, "Replicas of the model behind one server. Default: 1.", short="dp", minimum=1
    )
    max_model_len: int | None = option(None, "Longest sequence; default: the model's own.", minimum=1)
    serve_arg: list[str] = option(
        [], "Further flags of shoal serve, each as --serve-arg=--flag=value, such as --serve-arg=--max-num-seqs=64."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class K8sStorageOptions:
    """Where models lie: one of four, mounted at /models."""

    claim: str | None = option(None, "A PersistentVolumeClaim that exists.")
    storage_class: str | None = option(None, "Make a claim of this storage class (many machines read it).")
    bucket: str | None = option(None, "Object storage: a volume and a claim for this bucket.")
    host_path: str | None = option(None, "A directory that every machine has.")
    volume_size: str = option("200Gi", "Size of the claim.")
    bucket_prefix: str | None = option(None, "Only what begins so in the bucket.")
    bucket_endpoint: str | None = option(None, "URL of an S3-compatible store; default: the driver's own.")
    bucket_region: str | None = option(None, "Region of the bucket.")
    bucket_secret: str | None = option(None, "Secret with credentials, for drivers that take one from the volume.")
    csi_driver: str = option(S3_DRIVER, "CSI driver that mounts the bucket.")
    volume_attribute: list[str] = option([], "More of the volume for the driver, each as NAME=VALUE.")
    mount_option: list[str] = option([], "More options of the mount.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class K8sPodOptions:
    """The pods."""

    cpus: str | None = option(None, "CPUs that each pod asks for; default: the plan's, else 4.")
    memory: str | None = option(
        None, "Memory that each pod asks for, and may have, /dev/shm included; default: the plan's, else 16Gi."
    )
    shm_size: str = option("2Gi", "Size of /dev/shm.")
    port: int = option(8000, "Port of the servers.", minimum=1, maximum=65535)
    router: bool = option(True, "Put routers before the servers (deployment, lws).")
    router_replicas: int = option(2, "How many.", minimum=1)
    router_port: int = option(9000, "Their port.", minimum=1, maximum=65535)
    drain_timeout: int = option(120, "Seconds that running requests have to finish when a pod ends.", minimum=0)
    start_timeout: int = option(1800, "Seconds until a server must be ready.", minimum=10)
    one_pod_per_host: bool = option(True, "Keep the pods of servers on different machines.")
    gpu_resource: str = option("nvidia.com/gpu", "What the cluster calls a GPU.")
    node_selector: list[str] = option([], "Machines for the servers, each as LABEL=VALUE.")
    runtime_class: str | None = option(None, "RuntimeClass of pods with GPUs, such as nvidia.")
    user_id: int = option(10001, "User and group of all processes; not 0.", minimum=1)
    ray_version: str | None = option(None, "rayservice: Ray of the image; default: the one that is installed here.")


K8S_SECTIONS = (K8sOptions, K8sModelOptions, K8sStorageOptions, K8sPodOptions)
