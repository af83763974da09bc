"""What the `shoal deploy` commands do: find the cluster, or begin one, and talk to its controller."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from shoal import env, network
from shoal.cluster.deploy.actors import needs_admin_key
from shoal.cluster.deploy.controller_actor import CONTROLLER, ControllerActor
from shoal.cluster.deploy.ray_fleet import find_actor, forget_state, lasting, load_state
from shoal.cluster.deploy.records import Deployment, DeployStatus
from shoal.cluster.node import start_node, stop_node
from shoal.cluster.ray_node import NodePlan
from shoal.config.deploy_file import DeployPlan
from shoal.errors import ConfigError, StartupError
from shoal.executor import ray_head, ray_join
from shoal.network.node_record import read_record

# The controller looks at once, but it may be on its way back from its own end.
_CALL_SECONDS = 60.0
_GONE_SECONDS = 10.0
SERVE = (sys.executable, "-m", "shoal.cli", "serve")
ROUTER = (sys.executable, "-m", "shoal.cli", "router")


@dataclasses.dataclass(frozen=True)
class Target:
    """Which cluster. address: HOST:PORT of its head; None: RAY_ADDRESS, the node of this machine, or a Ray here."""

    address: str | None = None
    token_file: str | None = None


class Deployer:
    """A driver of the cluster, for one command. Made by `connect`.

    program: what runs a replica of a new deployment.
    """

    program = SERVE

    def __init__(self, head: str, began: bool, is_alone: bool) -> None:
        """began: the cluster was begun for this. is_alone: it has one node, its head."""
        self.head, self.began, self.is_alone = head, began, is_alone

    def deploy(self, plan: DeployPlan) -> None:
        """Tell the controller, or start one. Raises ConfigError for what it cannot change."""
        status = self.status()
        if status is not None and status.stopped:
            self.remove_controller()  # whoever stopped it did not come to that
        controller = find_actor(CONTROLLER) or self._start_controller(plan)
        why_not = self._ask(controller.apply.remote(plan.encode()))
        if why_not:
            raise ConfigError(why_not)

    def status(self) -> DeployStatus | None:
        """None where nothing is deployed."""
        controller = find_actor(CONTROLLER)
        if controller is None:
            return None
        return msgspec.json.decode(self._ask(controller.status.remote()), type=DeployStatus)

    def begin_stop(self) -> None:
        controller = find_actor(CONTROLLER)
        if controller is None and (saved := load_state()) is not None:
            # It was killed for good: another takes over from what it had saved.
            controller = self._start_controller(msgspec.json.decode(saved, type=Deployment).plan)
        if controller is not None:
            self._ask(controller.begin_stop.remote())

    def remove_controller(self) -> None:
        """The last step of a stop: returns when no actor of that name is left."""
        import ray

        controller = find_actor(CONTROLLER)
        if controller is not None:
            ray.kill(controller)
        deadline = time.monotonic() + _GONE_SECONDS
        while find_actor(CONTROLLER) is not None and time.monotonic() < deadline:
            time.sleep(0.1)
        forget_state()

    def _start_controller(self, plan: DeployPlan) -> Any:
        import ray

        admin_key = plan.router.options.get("admin_key")
        if admin_key is None and needs_admin_key(plan.router.host):
            admin_key = secrets.token_hex(16)
        first = Deployment(
            plan=plan,
            program=list(self.program),
            router_program=list(ROUTER),
            api_key=secrets.token_hex(16),
            admin_key=admin_key,
            owns_node=self.began,
        )
        node = ray.get_runtime_context().get_node_id()
        # On any node: when that one ends, Ray starts it again on another.
        options = lasting(
            CONTROLLER,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=4,
        )
        return ray.remote(ControllerActor).options(**options).remote(msgspec.json.encode(first), node)

    def _ask(self, reference: Any) -> Any:
        import ray

        with ray_join.translated("the controller of the deployment does not answer"):
            return ray.get(reference, timeout=_CALL_SECONDS)


@contextlib.contextmanager
def connect(target: Target, *, begin: bool = False) -> Iterator[Deployer | None]:
    """Join the cluster for the length of the block. begin: start one on this machine where there is none; else None.

    Raises ConfigError or StartupError, as `shoal node start` does.
    """
    ray_head.check_installed()
    head = _find_head(target)
    token: str | None
    began = False
    if head is None:
        if not begin:
            yield None
            return
        token = network.load_token(target.token_file) if target.token_file else _own_token()
        head = start_node(NodePlan(head=None, token=token)).head
        began = True
    else:
        token = ray_join.find_token(head, target.token_file)
    try:
        answer = ray_head.ask_head(head, token)
        ray_head.check_versions(head, answer)
        ray_join.join(head, token, ray_join.own_address(head, answer), namespace=f"shoal-{secrets.token_hex(8)}")
    except BaseException:
        if began:
            stop_node()
        raise
    import ray

    try:
        yield Deployer(head, began, is_alone=sum(node.alive for node in answer.nodes) == 1)
    finally:
        ray.shutdown()


def end_cluster(deployer: Deployer) -> bool:
    """End what was begun for a deployment that is gone, unless other machines have joined it, or this is one of those.

    Returns whether it has ended. After the block of `connect`.
    """
    record = read_record()
    is_here = record is not None and record.is_head and record.head == deployer.head
    if is_here and deployer.is_alone:
        stop_node()
    return is_here and deployer.is_alone


def _find_head(target: Target) -> str | None:
    """HOST:PORT; None where no cluster is known."""
    named = target.address or env.ray_address()
    if named is not None and "://" in named:
        raise ConfigError(f"{named} is a gateway for remote clients; name the cluster by its head: HOST:PORT")
    if named is not None and named != "auto":
        return network.format_endpoint(*network.split_endpoint(named, ray_head.DEFAULT_PORT))
    record = read_record()
    if record is not None:
        return record.head
    found = ray_join.clusters_here()
    if len(found) > 1:
        raise StartupError(f"several Ray clusters run here: {', '.join(sorted(found))}; --address HOST:PORT says which")
    return found.pop() if found else None


def _own_token() -> str:
    return network.load_token() if env.cluster_token() else network.create_token()
