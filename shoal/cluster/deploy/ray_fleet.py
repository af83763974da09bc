"""The Fleet of a Ray cluster: named actors that outlive whoever started them, and Ray's own table to remember in."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from shoal.cluster.deploy.actors import ReplicaActor, RouterActor
from shoal.cluster.deploy.fleet import Backend, Fleet, read_backends, read_drained
from shoal.cluster.deploy.records import Launch, Report
from shoal.executor import ray_head, ray_join
from shoal.log import get_logger

NAMESPACE = "shoal-deploy"
_KEY = b"deployment"
_ROUTER = "router"
_ANSWER_SECONDS = 1.0
# A node that is cut off is given up by the head within seconds; an actor that hangs, by this.
_SILENT_SECONDS = 60.0
_ROOM_SECONDS = 5.0

logger = get_logger(__name__)


def load_state() -> bytes | None:
    """What was saved last; None where there is no deployment. Needs a process that has joined the cluster."""
    with ray_head.private_names():
        from ray.experimental.internal_kv import _internal_kv_get

        state: bytes | None = _internal_kv_get(_KEY, namespace=NAMESPACE.encode())
    return state


def save_state(state: bytes) -> None:
    with ray_head.private_names():
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(_KEY, state, overwrite=True, namespace=NAMESPACE.encode())


def forget_state() -> None:
    with ray_head.private_names():
        from ray.experimental.internal_kv import _internal_kv_del

        _internal_kv_del(_KEY, namespace=NAMESPACE.encode())


def find_actor(name: str) -> Any:
    """Its handle; None where there is none."""
    import ray

    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def lasting(name: str, **options: Any) -> dict[str, Any]:
    """Options of an actor that stays when its maker is gone, and of which there is one."""
    return {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True, **options}


def where(node_id: str) -> Any:
    """For an actor that asks for no CPUs: on this node while it is there, else on any.

    Ray places actors without resources at random, soft affinity or not; it heeds only one that is a must.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    is_there = any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())
    return NodeAffinitySchedulingStrategy(node_id, soft=False) if is_there else "DEFAULT"


class _Line:
    """One actor, and the question that it has not answered yet."""

    def __init__(self, handle: Any, needs: str = "") -> None:
        self.handle = handle
        self.needs = needs
        self.question: Any = None
        self.since = time.monotonic()
        self.report = Report()
        self.has_answered = False


class RayFleet(Fleet):
    """router_node: id of the node where the router is while that is there."""

    def __init__(self, router_node: str) -> None:
        self._router_node = router_node
        self._lines: dict[str, _Line] = {}
        self._router: _Line | None = None
        self._published = ""
        self._publishing: Any = None

    def save(self, state: bytes) -> None:
        save_state(state)

    def has_gpus(self) -> bool:
        import ray

        return bool(ray.cluster_resources().get("GPU", 0.0))

    # --- replicas ----------------------------------------------------------------------------------------------------

    def start(self, name: str, launch: Launch, *, num_cpus: float, num_gpus: float) -> None:
        import ray

        if name in self._lines:
            return

        options = lasting(
            _replica(name),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_restarts=0,
            max_concurrency=4,
            scheduling_strategy="SPREAD",  # a node that ends takes few along
        )
        handle = ray.remote(ReplicaActor).options(**options).remote(msgspec.json.encode(launch))
        needs = f"{num_cpus:g} CPUs" + (f" and {num_gpus:g} GPUs" if num_gpus else "")
        self._lines[name] = _Line(handle, needs)

    def reports(self, names: list[str]) -> dict[str, Report | None]:
        for name in names:
            if name not in self._lines and (handle := find_actor(_replica(name))) is not None:
                self._lines[name] = _Line(handle)
        asked = {name: self._lines[name] for name in names if name in self._lines}
        told = self._ask(asked)
        for name in [name for name, report in told.items() if report is None]:
            self.remove(name)
        return {name: told.get(name) for name in names}

    def stop(self, name: str) -> None:
        if name in self._lines:
            self._lines[name].handle.stop.remote()

    def remove(self, name: str) -> None:
        line = self._lines.pop(name, None)
        if line is not None:
            _kill(line.handle)

    # --- the router --------------------------------------------------------------------------------------------------

    def publish(self, text: str, host: str, port: int, admin_key: str | None, launch: Launch) -> None:
        import ray

        if self._router is None:
            options = lasting(
                _ROUTER,
                num_cpus=0,
                max_restarts=0,
                max_concurrency=8,
                scheduling_strategy=where(self._router_node),
            )
            actor = ray.remote(RouterActor).options(**options)
            self._router = _Line(actor.remote(msgspec.json.encode(launch), host, port, admin_key))
        if self._published != text:
            self._publishing = self._router.handle.publish.remote(text)
            self._published = text

    def router(self) -> Report | None:
        if self._router is None and (handle := find_actor(_ROUTER)) is not None:
            self._router = _Line(handle)
        if self._router is None:
            return None
        self._check_publishing()
        report = self._ask({_ROUTER: self._router})[_ROUTER]
        if report is None:
            logger.warning("the router's actor is gone")
            self.remove_router()
        return report

    def _check_publishing(self) -> None:
        """A file that could not be written is written again."""
        import ray

        if self._publishing is None or not ray.wait([self._publishing], timeout=0)[0]:
            return
        try:
            ray.get(self._publishing)
        except ray.exceptions.RayError as error:
            logger.error("the router's file could not be written: %s", ray_join.first_line(error))
            self._published = ""
        self._publishing = None

    def backends(self) -> Mapping[str, Backend] | None:
        answer = self._ask_router("backends")
        return read_backends(answer) if answer is not None else None

    def drain(self, url: str) -> int | None:
        answer = self._ask_router("drain", url)
        return read_drained(answer) if answer is not None else None

    def stop_router(self) -> None:
        if self._router is not None:
            self._router.handle.stop.remote()

    def remove_router(self) -> None:
        if self._router is not None:
            _kill(self._router.handle)
        self._router = self._publishing = None
        self._published = ""

    # --- asking ------------------------------------------------------------------------------------------------------

    def _ask_router(self, method: str, *arguments: str) -> bytes | None:
        import ray

        if self._router is None:
            return None
        try:
            # The actor itself waits no longer for its router than this.
            answer = ray.get(getattr(self._router.handle, method).remote(*arguments), timeout=3 * _ANSWER_SECONDS)
        except (*_gone(), ray.exceptions.GetTimeoutError):
            return None
        return answer if isinstance(answer, bytes) else None

    def _ask(self, lines: Mapping[str, _Line]) -> dict[str, Report | None]:
        """What each said last; who does not answer in time is asked no second question before the answer is there."""
        import ray

        for line in lines.values():
            if line.question is None:
                line.question = line.handle.report.remote()
        questions = [line.question for line in lines.values()]
        if questions:
            ray.wait(questions, num_returns=len(questions), timeout=_ANSWER_SECONDS)
        return {name: self._read(name, line) for name, line in lines.items()}

    def _read(self, name: str, line: _Line) -> Report | None:
        import ray

        now = time.monotonic()
        ready, _ = ray.wait([line.question], timeout=0)
        if ready:
            question, line.question = line.question, None
            try:
                line.report = msgspec.json.decode(ray.get(question), type=Report)
                line.has_answered, line.since = True, now
                return line.report
            except ray.exceptions.ActorUnavailableError:
                pass  # for the moment
            except _gone() as error:
                logger.warning("%s: its actor has died: %s", name, ray_join.first_line(error))
                return None
        if not line.has_answered:
            if now - line.since > _ROOM_SECONDS:
                line.report.why = f"waits until a node has {line.needs or 'room'} for it; free are {_free()}"
        elif now - line.since > _SILENT_SECONDS:
            logger.warning("%s: its actor has not answered for %g s and is given up", name, _SILENT_SECONDS)
            return None
        return line.report


def _replica(name: str) -> str:
    return f"replica {name}"


def _gone() -> tuple[type[Exception], ...]:
    """What Ray raises for an actor that has died; unschedulable: its node went before it was there."""
    import ray

    return ray.exceptions.RayActorError, ray.exceptions.ActorUnschedulableError


def _kill(handle: Any) -> None:
    import ray

    try:
        ray.kill(handle)
    except ray.exceptions.RayError as error:
        logger.warning("an actor could not be ended: %s", error)


def _free() -> str:
    import ray

    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs in all"
