"""What shall be rendered, checked: RenderRequest. Pure; the CLI fills it, the forms read it."""

from __future__ import annotations

import dataclasses
import math
import re

from shoal.errors import ConfigError

FORMS = ("deployment", "rayservice", "lws")
# Where the volume with models is in every container.
MODEL_MOUNT = "/models"
S3_DRIVER = "s3.csi.aws.com"

_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# Names of objects get suffixes ("-servers"), and the longest must still be a label.
_MOST_NAME_LENGTH = 48
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
_LABEL_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
# What the manifests say themselves; a second one of these among the further arguments would contradict them.
_OWN_FLAGS = (
    "host", "port", "model", "served-model-name", "tensor-parallel-size", "tp", "pipeline-parallel-size", "pp",
    "data-parallel-size", "dp", "max-model-len", "nnodes", "node-rank", "master-addr", "master-port", "nodes",
    "distributed-executor-backend", "shutdown-timeout", "api-key", "token-file", "config", "device",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Storage:
    """Where models lie; at most one of claim, storage_class, bucket and host_path.

    claim: a PersistentVolumeClaim that exists. storage_class: one is made, of `size`. bucket: object storage, which the
    CSI driver `driver` mounts, with a volume and a claim of its own; bucket_secret: its credentials, for drivers that
    take them from there. host_path: a directory that every machine has.
    """

    claim: str | None = None
    storage_class: str | None = None
    size: str = "200Gi"
    bucket: str | None = None
    bucket_prefix: str | None = None
    bucket_endpoint: str | None = None
    bucket_region: str | None = None
    bucket_secret: str | None = None
    driver: str = S3_DRIVER
    attributes: dict[str, str] = dataclasses.field(default_factory=dict)
    mount_options: tuple[str, ...] = ()
    host_path: str | None = None

    @property
    def kind(self) -> str | None:
        """The field that says where; None where there is no volume."""
        given = [name for name in ("claim", "storage_class", "bucket", "host_path") if getattr(self, name) is not None]
        if len(given) > 1:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(f"{flags} both say where models lie; give one of them")
        return given[0] if given else None


@dataclasses.dataclass(frozen=True)
class RenderRequest:
    """See the options of `shoal k8s render`. Raises ConfigError for what cannot be, when it is made."""

    form: str
    name: str
    namespace: str
    image: str
    model: str
    served_model_name: tuple[str, ...] = ()
    replicas: int = 1
    max_replicas: int | None = None
    gpus_per_pod: int = 1
    pods_per_replica: int = 1
    tensor_size: int = 1
    pipeline_size: int = 1
    data_size: int = 1
    max_model_len: int | None = None
    serve_arguments: tuple[str, ...] = ()
    cpus: str = "4"
    memory: str = "16Gi"
    shm_size: str = "2Gi"
    port: int = 8000
    router: bool = True
    router_replicas: int = 2
    router_port: int = 9000
    drain_seconds: int = 120
    start_seconds: int = 1800
    one_pod_per_host: bool = True
    gpu_resource: str = "nvidia.com/gpu"
    node_selector: dict[str, str] = dataclasses.field(default_factory=dict)
    runtime_class: str | None = None
    image_pull_secret: str | None = None
    existing_secret: str | None = None
    user_id: int = 10001
    ray_version: str = ""
    storage: Storage = dataclasses.field(default_factory=Storage)

    @property
    def world_size(self) -> int:
        """Ranks of one replica."""
        return self.tensor_size * self.pipeline_size * self.data_size

    @property
    def secret_name(self) -> str:
        return self.existing_secret or f"{self.name}-secret"

    @property
    def grace_seconds(self) -> int:
        """From the wish to end a pod to SIGKILL: see `pods.LEAVE_SECONDS`; requests drain; the engine ends."""
        return LEAVE_SECONDS + self.drain_seconds + ENGINE_END_SECONDS

    def __post_init__(self) -> None:
        self._check_names()
        self._check_layout()
        self._check_amounts()
        self._check_model()
        for argument in self.serve_arguments:
            flag = argument.split("=")[0].lstrip("-").replace("_", "-")
            if not argument.startswith("-"):
                raise ConfigError(f"--serve-arg must be a flag of shoal serve, as --flag=value; got {argument!r}")
            if flag in _OWN_FLAGS:
                raise ConfigError(f"--serve-arg {argument}: the manifests set {flag} themselves")

    def _check_names(self) -> None:
        if self.form not in FORMS:
            raise ConfigError(f"--form must be one of {', '.join(FORMS)}; got {self.form!r}")
        names = {"--name": self.name, "--namespace": self.namespace, "--claim": self.storage.claim}
        names |= {"--existing-secret": self.existing_secret, "--image-pull-secret": self.image_pull_secret}
        for flag, name in names.items():
            if name is not None and not _DNS_LABEL.fullmatch(name):
                raise ConfigError(
                    f"{flag} must be lower-case letters, digits and dashes, with no dash at either end; got {name!r}"
                )
        if len(self.name) > _MOST_NAME_LENGTH:
            raise ConfigError(
                f"--name may have {_MOST_NAME_LENGTH} characters: others are made of it; got {self.name!r}"
            )
        if not self.image or re.search(r"\s", self.image):
            raise ConfigError(
                f"--image must name a container image, such as registry.example/shoal:1; got {self.image!r}"
            )
        for key, value in self.node_selector.items():
            if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                raise ConfigError(f"--node-selector must be LABEL=VALUE as Kubernetes writes labels; got {key}={value}")
        if not _LABEL_KEY.fullmatch(self.gpu_resource):
            raise ConfigError(f"--gpu-resource must be a name such as nvidia.com/gpu; got {self.gpu_resource!r}")

    def _check_layout(self) -> None:
        degrees = f"tensor {self.tensor_size} × pipeline {self.pipeline_size} × data {self.data_size}"
        places = self.pods_per_replica * self.gpus_per_pod
        if self.form == "deployment" and self.pods_per_replica > 1:
            raise ConfigError(
                f"a Deployment's pods are independent, so a replica cannot have {self.pods_per_replica} of them; "
                "--form lws or --form rayservice spreads one over pods"
            )
        if self.gpus_per_pod and self.world_size > places:
            wanted = math.ceil(self.world_size / self.gpus_per_pod)
            raise ConfigError(
                f"{degrees} is {self.world_size} ranks, and a replica has {places} GPUs ({self.pods_per_replica} × "
                f"{self.gpus_per_pod}): more --gpus-per-pod, or --pods-per-replica {wanted} with --form lws or "
                "rayservice"
            )
        if self.world_size % self.pods_per_replica:
            raise ConfigError(
                f"{degrees} is {self.world_size} ranks, which cannot be shared evenly by {self.pods_per_replica} pods"
            )
        if self.max_replicas is not None:
            if self.form == "rayservice":
                raise ConfigError(
                    "--max-replicas is for the forms deployment and lws; a RayService has its own scaling"
                )
            if self.max_replicas < self.replicas:
                raise ConfigError(f"--max-replicas {self.max_replicas} is below --replicas {self.replicas}")

    def _check_amounts(self) -> None:
        for flag, text in (
            ("--memory", self.memory),
            ("--shm-size", self.shm_size),
            ("--volume-size", self.storage.size),
        ):
            if quantity(text, flag) < 2**20:
                raise ConfigError(f"{flag} {text} is less than 1Mi; 16Gi would be sixteen gibibytes")
        if quantity(self.cpus, "--cpus") <= 0:
            raise ConfigError(f"--cpus must be above 0; got {self.cpus}")
        if quantity(self.shm_size, "--shm-size") >= quantity(self.memory, "--memory"):
            raise ConfigError(
                f"--shm-size {self.shm_size} counts as a part of --memory {self.memory}, and leaves nothing of it"
            )

    def _check_model(self) -> None:
        kind = self.storage.kind
        inside = self.model == MODEL_MOUNT or self.model.startswith(f"{MODEL_MOUNT}/")
        if not self.model:
            raise ConfigError("--model must name what is served: a directory below /models, or shoal-tiny")
        if inside and kind is None:
            raise ConfigError(
                f"--model {self.model} is on the volume {MODEL_MOUNT}, and nothing says what that is: --claim NAME, "
                "--storage-class NAME, --bucket NAME or --host-path DIRECTORY"
            )
        if kind is not None and not inside:
            raise ConfigError(
                f"the volume is mounted at {MODEL_MOUNT} in the containers, so --model must be below it, such as "
                f"{MODEL_MOUNT}/{self.model.rstrip('/').rsplit('/', 1)[-1]}; got {self.model}"
            )
        if self.storage.host_path is not None and not self.storage.host_path.startswith("/"):
            raise ConfigError(f"--host-path must be an absolute path; got {self.storage.host_path!r}")


# A pod that ends is first taken out of Services and routers; until they have heard of it, it serves on.
LEAVE_SECONDS = 5
ENGINE_END_SECONDS = 15


def quantity(text: str, flag: str) -> float:
    """A number of Kubernetes' ("500m", "16Gi"). Raises ConfigError."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ConfigError(f"{flag} must be an amount as Kubernetes writes it, such as 16Gi, 500M or 4; got {text!r}")
    return float(match[1]) * _UNITS[match[2] or ""]


def pairs(texts: list[str], flag: str) -> dict[str, str]:
    """ "key=value" each. Raises ConfigError."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{flag} must be NAME=VALUE; got {text!r}")
        found[key] = value
    return found
