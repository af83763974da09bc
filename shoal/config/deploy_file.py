"""What `shoal deploy CONFIG.yaml` is told: models, their replicas and how these scale, and the router before them.

Everything is checked here, with the line where it stands; the controller of shoal.cluster.deploy works from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import re
from typing import Any

import msgspec

from shoal.config.flags import spell_flag
from shoal.config.options import RouterOptions, option
from shoal.config.sources import SERVE_SECTIONS
from shoal.config.yaml_entry import Entry, read_entries

_TOP = ("models", "router")
_PARTS = ("replicas", "layout", "scale", "serve")
_TLS = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs")
# What the deployment itself decides for its replicas: option -> what to write in its place.
_OWN_OPTIONS = {
    "model": "models[].model",
    "served_model_name": "models[].name, and aliases of the router for further names",
    "tensor_parallel_size": "layout",
    "pipeline_parallel_size": "layout",
    "data_parallel_size": "layout",
    **dict.fromkeys(("host", "port"), "no address: each replica gets a port of its node"),
    "api_key": "router.keys or router.api_key for clients; replicas and router share a key of their own",
    "internal_token": "nothing: replicas and router share a key of their own",
    **dict.fromkeys(_TLS, "no TLS: replicas are reached by their router alone"),
    **dict.fromkeys(("nnodes", "node_rank", "master_addr", "master_port"), "distributed_executor_backend: ray"),
    "token_file": "shoal deploy --token-file",
}
_ROUTER_LISTS = ("keys", "aliases", "golden")
_NAME = re.compile(r"[A-Za-z0-9/][A-Za-z0-9._/-]{0,255}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelNames:
    """One model."""

    name: str | None = option(None, "Its name in the API; default: the model.")
    model: str | None = option(None, "As for shoal serve: a directory that every node has, or shoal-tiny.")
    start_timeout: float = option(600.0, "Seconds that a replica may take until it is ready.", minimum=1)
    drain_timeout: float = option(
        120.0,
        "Seconds that requests have to finish on a replica that goes; then they move to others.",
        minimum=0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaLimits:
    """How many replicas there are."""

    min: int = option(1, "Fewest.", minimum=1)
    max: int = option(1, "Most.", minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Of one replica."""

    tensor_parallel_size: int = option(1, "Ranks that share each layer.", minimum=1)
    pipeline_parallel_size: int = option(1, "Pipeline stages.", minimum=1)
    data_parallel_size: int = option(1, "Engines behind one server.", minimum=1)
    num_gpus: float | None = option(None, "GPUs that Ray sets apart; default: one a rank, none on a CPU.", minimum=0)
    num_cpus: float | None = option(None, "CPUs that Ray sets apart; default: 1 with GPUs, else one a rank.", minimum=0)

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleRules:
    """When replicas come and go."""

    target_queue: float = option(2.0, "Requests that may wait, for each replica.", minimum=0)
    target_kv_usage: float = option(0.85, "Share of the KV cache that may be in use.", minimum=0.05, maximum=1)
    target_running: float | None = option(
        None, "Requests that may run, for each replica; default: as many as it runs at a time.", minimum=0.1
    )
    up_after: float = option(3.0, "Seconds above a target after which replicas are added.", minimum=0)
    down_after: float = option(60.0, "Seconds far below all targets after which one replica goes.", minimum=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """One model of a deployment. serve: options of shoal serve by field name."""

    name: str
    model: str
    replicas: ReplicaLimits
    layout: Layout
    scale: ScaleRules
    serve: dict[str, Any]
    start_timeout: float = 600.0
    drain_timeout: float = 120.0

    @property
    def revision(self) -> str:
        """Differs where running replicas cannot take a change over: they are replaced then."""
        essence = msgspec.json.encode([self.model, self.layout, sorted(self.serve.items())])
        return hashlib.sha256(essence).hexdigest()[:10]

    @property
    def is_spread(self) -> bool:
        """Whether the replica's own engine asks Ray for its ranks' places, on several nodes maybe."""
        return self.serve.get("distributed_executor_backend") == "ray"

    def flags(self) -> list[str]:
        """What stands behind `shoal serve`, but for the address."""
        layout = self.layout
        flags = [self.model, f"--served-model-name={self.name}"]
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if getattr(layout, name) != 1:
                flags.append(f"{spell_flag(name)}={getattr(layout, name)}")
        for name, value in sorted(self.serve.items()):
            if isinstance(value, bool):
                flags.append(spell_flag(name if value else f"no_{name}"))
            elif isinstance(value, list):
                text = ",".join(map(str, value)) if name == "pipeline_layer_partition" else msgspec.json.encode(value)
                flags.append(f"{spell_flag(name)}={text if isinstance(text, str) else text.decode()}")
            elif value is not None:
                flags.append(f"{spell_flag(name)}={value}")
        return flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterPlan:
    """options: of shoal router, by field name. lists: keys, aliases and golden, as a router's file has them."""

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    lists: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def host(self) -> str:
        return str(self.options.get("host", RouterOptions.host))

    @property
    def port(self) -> int:
        return int(self.options.get("port", RouterOptions.port))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeployPlan:
    """A whole deployment."""

    models: tuple[ModelPlan, ...]
    router: RouterPlan

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> DeployPlan:
        return msgspec.json.decode(data, type=cls)


def read_deploy_file(path: str) -> DeployPlan:
    """Raises ConfigError that names the file, the line, what was found and what would work."""
    root = read_entries(path)
    fields = _known(root, _TOP)
    if "models" not in fields:
        raise root.error("there is no `models:` list; it names at least one: models: [{name: tiny, model: shoal-tiny}]")
    models: dict[str, ModelPlan] = {}
    for entry in fields["models"].items():
        plan = _model(entry)
        if plan.name in models:
            raise entry.error(f"is a second model of the name {plan.name!r}; give each its own")
        models[plan.name] = plan
    if not models:
        raise fields["models"].error("names no model")
    router = _router(fields["router"]) if "router" in fields else RouterPlan()
    return DeployPlan(models=tuple(models.values()), router=router)


def _model(entry: Entry) -> ModelPlan:
    known = (*(field.name for field in dataclasses.fields(ModelNames)), *_PARTS)
    fields = _known(entry, known)
    names = ModelNames(**entry.options(ModelNames, beside=_PARTS))
    if not names.model:
        raise entry.error("has no `model:`; shoal-tiny comes with Shoal, any other is a directory")
    name = names.name or names.model
    if not _NAME.fullmatch(name):
        raise (fields.get("name") or fields["model"]).error(
            f"must be letters, digits and . _ / - to name the model in the API; got {name!r} (`name:` gives another)"
        )
    return ModelPlan(
        name=name,
        model=names.model,
        replicas=_replicas(fields["replicas"]) if "replicas" in fields else ReplicaLimits(),
        layout=_layout(fields["layout"]) if "layout" in fields else Layout(),
        scale=ScaleRules(**fields["scale"].options(ScaleRules)) if "scale" in fields else ScaleRules(),
        serve=_serve(fields["serve"]) if "serve" in fields else {},
        start_timeout=names.start_timeout,
        drain_timeout=names.drain_timeout,
    )


def _replicas(entry: Entry) -> ReplicaLimits:
    """`{min: 1, max: 3}`, or a number for always so many."""
    if isinstance(entry.value, int) and not isinstance(entry.value, bool):
        if entry.value < 1:
            raise entry.error(f"must be 1 or more; got {entry.value}")
        return ReplicaLimits(min=entry.value, max=entry.value)
    values = entry.options(ReplicaLimits)
    values.setdefault("max", max(values.get("min", 1), 1))
    limits = ReplicaLimits(**values)
    if limits.min > limits.max:
        raise entry.error(f"has min {limits.min} above max {limits.max}")
    return limits


def _layout(entry: Entry) -> Layout:
    return Layout(**entry.options(Layout))


def _serve(entry: Entry) -> dict[str, Any]:
    for name, field in entry.fields().items():
        if name in _OWN_OPTIONS:
            raise field.error(f"is not for a deployment to set; write {_OWN_OPTIONS[name]}")
    return entry.options(*SERVE_SECTIONS)


def _router(entry: Entry) -> RouterPlan:
    fields = entry.fields()
    for name in ("backend", "backends"):
        if name in fields:
            raise fields[name].error("is not for a deployment to set: it tells its router itself")
    lists = {name: fields[name].value for name in _ROUTER_LISTS if name in fields and fields[name].value is not None}
    options = entry.options(RouterOptions, beside=_ROUTER_LISTS)
    for name in (*_TLS, "internal_token"):
        if name in options:
            raise entry.error(
                f"has {name}, which is not for a deployment to set: it asks its router by HTTP, and replicas have a "
                "key of their own; a proxy, or another `shoal router`, in front of it can speak https"
            )
    if options.get("port") == 0:
        raise fields["port"].error("must be a port that clients know, such as 9000; 0 is any free one")
    return RouterPlan(options=options, lists=lists)


def _known(entry: Entry, names: tuple[str, ...]) -> dict[str, Entry]:
    fields = entry.fields()
    for name, field in fields.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise field.error(f"is not known; {f'did you mean {near[0]}?' if near else f'there is {_listed(names)}'}")
    return fields


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
