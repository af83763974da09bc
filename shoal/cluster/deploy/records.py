"""What the controller, its replicas and the CLI tell each other, and what the controller keeps: JSON."""

from __future__ import annotations

import msgspec

from shoal.cluster.deploy.scaling import History
from shoal.config.deploy_file import DeployPlan, ModelPlan


class Launch(msgspec.Struct, kw_only=True):
    """What a replica's or the router's actor runs. program: what stands before the flags.

    variables: more environment. takes_gpus: it gets those that Ray gave the actor. needs_ray: it joins the Ray cluster
    by itself. grace: seconds from SIGTERM to SIGKILL.
    """

    program: list[str]
    flags: list[str]
    variables: dict[str, str] = {}
    takes_gpus: bool = False
    needs_ray: bool = False
    grace: float = 60.0


class Report(msgspec.Struct, kw_only=True):
    """What an actor says of its program. started: Unix time of the process; why: of a state that is not ready.

    state: starting, ready, unhealthy, restarting, stopping or stopped. num_early_ends: how often in a row it ended
    before it was ready.
    """

    state: str = "starting"
    why: str = ""
    url: str | None = None
    node: str = ""
    pid: int | None = None
    started: float | None = None
    num_restarts: int = 0
    num_early_ends: int = 0
    was_ready: bool = False
    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0


class ReplicaRecord(msgspec.Struct, kw_only=True):
    """A replica that the controller has asked for. name: of its actor. created: Unix time.

    phase: up, draining (no new requests), or stopping (SIGTERM). since: of the phase, Unix time. served: it was once
    ready and in the router.
    """

    name: str
    model: str
    revision: str
    created: float
    phase: str = "up"
    since: float = 0.0
    served: bool = False
    why: str = ""


class ModelRecord(msgspec.Struct, kw_only=True):
    """Where a model stands. plan: what it shall be; None: it goes. stable: what was up last, to go back to.

    failure: why the newest plan is not followed.
    """

    plan: ModelPlan | None
    history: History
    stable: ModelPlan | None = None
    failure: str = ""
    why: str = ""


class Deployment(msgspec.Struct, kw_only=True):
    """All that the controller has to remember: it is kept in Ray's table, and read when the controller comes back.

    program: of replicas. api_key: between router and replicas. next_number: of replicas. stopping: all of it goes.
    """

    plan: DeployPlan
    program: list[str]
    router_program: list[str]
    api_key: str
    admin_key: str | None = None
    models: dict[str, ModelRecord] = {}
    replicas: dict[str, ReplicaRecord] = {}
    next_number: int = 1
    stopping: bool = False
    # Whether `shoal deploy` began the cluster itself, so that `shoal deploy stop` ends it.
    owns_node: bool = False


class ReplicaStatus(msgspec.Struct, kw_only=True):
    """A line of `shoal deploy status`."""

    name: str
    revision: str
    state: str
    why: str = ""
    node: str = ""
    url: str | None = None
    pid: int | None = None
    uptime: float | None = None
    restarts: int = 0
    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0
    in_router: bool = False


class ModelStatus(msgspec.Struct, kw_only=True):
    """revision: what is being brought to. settled: nothing is under way."""

    name: str
    revision: str
    wanted: int
    min: int
    max: int
    why: str
    settled: bool
    failure: str = ""
    replicas: list[ReplicaStatus] = []


class DeployStatus(msgspec.Struct, kw_only=True):
    """What `shoal deploy status --json` prints. stopped: nothing is left but the controller."""

    router_url: str | None = None
    router_state: str = ""
    router_pid: int | None = None
    models: list[ModelStatus] = []
    stopping: bool = False
    stopped: bool = False
    owns_node: bool = False
    failure: str = ""
