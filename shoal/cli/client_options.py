"""Options of the commands that talk to a server."""

from __future__ import annotations

import dataclasses
from typing import Any

from shoal.cli.bench_options import BENCH_SECTIONS
from shoal.cli.doctor_options import DoctorOptions
from shoal.cli.k8s_options import K8S_SECTIONS
from shoal.cli.plan_options import PlanOptions
from shoal.cli.verify_options import VerifyOptions
from shoal.config.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectionOptions:
    """The server."""

    url: str = option("http://127.0.0.1:8000", "Address of the server, with or without /v1.", aliases=("base_url",))
    model_name: str | None = option(None, "Model to ask; default: the first that the server names.", aliases=("model",))
    api_key: str | None = option(None, "Key to present, where the server asks for one.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen; what is not given is left to the server."""

    temperature: float | None = option(None, "0 is greedy; higher is more varied.", minimum=0)
    top_p: float | None = option(None, "Share of the probability that may be chosen from.", minimum=0, maximum=1)
    max_tokens: int | None = option(None, "Longest answer, in tokens.", minimum=1)
    seed: int | None = option(None, "The same seed gives the same answer.")
    stop: list[str] = option([], "Strings that end the answer.")

    def parameters(self) -> dict[str, Any]:
        """What was given, as fields of a request."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, [])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The conversation."""

    system_prompt: str | None = option(None, "What the model is told before the conversation.")
    quick: str | None = option(None, "Ask this one question and leave.", short="q")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompleteOptions:
    """The prompt."""

    prompt: str | None = option(
        None, "Text to continue; default: what comes in on standard input.", aliases=("quick",), short="q"
    )
    echo: bool = option(False, "Print the prompt before its continuation.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The demonstration."""

    once: bool = option(False, "End after the answer instead of serving on.")
    question: str = option("给我推荐中国适合旅游的地方", "What the model is asked.")
    model: str = option("shoal-tiny", "The model to serve.")
    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; when it is taken, any free one.", minimum=0, maximum=65535)
    max_tokens: int = option(256, "Longest answer, in tokens.", minimum=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectEnvOptions:
    """The report."""

    json: bool = option(False, "Print JSON instead of lines.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeStartOptions:
    """The node."""

    head: bool = option(False, "Begin a cluster: this machine is its head.")
    address: str | None = option(None, "Join the cluster whose head is at HOST:PORT (an address or a DNS name).")
    node_ip: str | None = option(
        None, "Address of this machine for the others; default: SHOAL_HOST_IP, else the one that routes to the head."
    )
    # Not `port`: SHOAL_PORT is the server's.
    head_port: int = option(6379, "With --head: port to listen on.", aliases=("port",), minimum=1, maximum=65535)
    dashboard: bool = option(
        False, "With --head: start Ray's dashboard, on 127.0.0.1:8265 of this machine; needs ray[default]."
    )
    num_gpus: int | None = option(None, "GPUs to offer; default: all.", minimum=0)
    num_cpus: int | None = option(None, "CPUs to offer; default: all.", minimum=0)
    resources: str | None = option(None, 'More resources, for Ray: JSON such as {"disk": 1}.')
    token_file: str | None = option(
        None, "File with the cluster's token; default: SHOAL_CLUSTER_TOKEN, else ~/.shoal/cluster-token."
    )
    block: bool = option(False, "Stay in the foreground; Ctrl-C or SIGTERM stops the node.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """The cluster."""

    address: str | None = option(None, "HOST:PORT of the head; default: RAY_ADDRESS, else the node of this machine.")
    token_file: str | None = option(
        None, "File with the cluster's token; default: SHOAL_CLUSTER_TOKEN, else ~/.shoal/cluster-token."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """The answer."""

    json: bool = option(False, "Print JSON instead of lines.")
    watch: bool = option(False, "Show it again every two seconds, until Ctrl-C.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterClientOptions:
    """The router."""

    router: str = option("http://127.0.0.1:9000", "Address of the router.")
    admin_key: str | None = option(None, "Its admin key, where it has one.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterTargetOptions:
    """The server."""

    backend_url: str | None = option(None, "Its URL, as the router was given it.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeployOptions:
    """The deployment."""

    deploy_file: str | None = option(None, "YAML file with the models, their replicas and the router.")
    wait: bool = option(True, "Return only when all replicas are up, or one does not come up.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeployStatusOptions:
    """The answer."""

    json: bool = option(False, "Print JSON instead of lines.")


CLIENT_SECTIONS = (
    ConnectionOptions,
    SamplingOptions,
    ChatOptions,
    CompleteOptions,
    DemoOptions,
    CollectEnvOptions,
    NodeStartOptions,
    ClusterOptions,
    StatusOptions,
    RouterClientOptions,
    RouterTargetOptions,
    DeployOptions,
    DeployStatusOptions,
    PlanOptions,
    VerifyOptions,
    *K8S_SECTIONS,
    DoctorOptions,
    *BENCH_SECTIONS,
)
