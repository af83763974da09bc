"""A world without Ray for the controller: replicas that come up after a while, a router, and a clock."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import msgspec

from shoal.cluster.deploy.controller import Controller
from shoal.cluster.deploy.fleet import Backend, Fleet
from shoal.cluster.deploy.records import Deployment, Launch, Report
from shoal.config.deploy_file import DeployPlan, Layout, ModelPlan, ReplicaLimits, RouterPlan, ScaleRules

START_SECONDS = 3.0


@dataclasses.dataclass
class FakeReplica:
    launch: Launch
    started: float
    url: str
    num_running: int = 0
    num_waiting: int = 0
    stopped_at: float | None = None
    breaks: bool = False


class FakeFleet(Fleet):
    """now: the time, which the test moves. rooms: replicas that the cluster has room for. starts: names, in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rooms = 100
        self.replicas: dict[str, FakeReplica] = {}
        self.starts: list[str] = []
        self.stops: list[str] = []
        self.saved = b""
        self.file: dict | None = None
        self.router_up = False
        self.router_answers = True
        self.router_stops_at: float | None = None
        self.draining: set[str] = set()
        self.left_out: set[str] = set()

    # --- what the controller does ---

    def save(self, state: bytes) -> None:
        self.saved = state

    def has_gpus(self) -> bool:
        return False

    def start(self, name: str, launch: Launch, *, num_cpus: float, num_gpus: float) -> None:
        if name in self.replicas:
            return
        assert name in msgspec.json.decode(self.saved, type=Deployment).replicas, "it was not written down before"
        assert name not in self.starts, "it was started before"
        self.starts.append(name)
        self.replicas[name] = FakeReplica(launch, self.now, f"http://{name}:1", breaks=launch.flags[0] == "broken")

    def reports(self, names: list[str]) -> dict[str, Report | None]:
        return {name: self._report(name) for name in names}

    def stop(self, name: str) -> None:
        replica = self.replicas[name]
        if replica.stopped_at is None:
            self.stops.append(name)
            replica.stopped_at = self.now

    def remove(self, name: str) -> None:
        self.replicas.pop(name, None)

    def publish(self, text: str, host: str, port: int, admin_key: str | None, launch: Launch) -> None:
        self.file = json.loads(text)
        self.router_up = True

    def router(self) -> Report | None:
        if not self.router_up:
            return None
        if self.router_stops_at is not None:
            return Report(state="stopped" if self.now > self.router_stops_at else "stopping")
        return Report(state="ready", url="http://router:9000", was_ready=True)

    def backends(self) -> Mapping[str, Backend] | None:
        if not self.router_answers or self.router_stops_at is not None or self.file is None:
            return None
        return {entry["url"]: self._backend(entry["url"]) for entry in self.file["backends"]}

    def drain(self, url: str) -> int | None:
        if self.backends() is None:
            return None
        self.draining.add(url)
        return self._backend(url).num_running

    def stop_router(self) -> None:
        if self.router_stops_at is None:
            self.router_stops_at = self.now + 1

    def remove_router(self) -> None:
        self.router_up = False

    # --- what is so ---

    def is_ready(self, name: str) -> bool:
        replica = self.replicas[name]
        return self._has_room(name) and self.now - replica.started >= START_SECONDS and not replica.breaks

    def serving(self) -> list[str]:
        """Names of those that the router sends requests to."""
        backends = self.backends() or {}
        return [name for name, each in self.replicas.items() if each.url in backends and backends[each.url].available]

    def _has_room(self, name: str) -> bool:
        return list(self.replicas).index(name) < self.rooms

    def _report(self, name: str) -> Report | None:
        replica = self.replicas.get(name)
        if replica is None:
            return None
        if replica.stopped_at is not None:
            return Report(state="stopped" if self.now > replica.stopped_at else "stopping", node="n", was_ready=True)
        if not self._has_room(name):
            return Report(why="there is no room")
        if replica.breaks and self.now - replica.started >= START_SECONDS:
            return Report(state="restarting", node="n", url=replica.url, num_early_ends=2, why="it is broken")
        if not self.is_ready(name):
            return Report(node="n", url=replica.url, pid=1)
        return Report(
            state="ready",
            node="n",
            url=replica.url,
            pid=1,
            was_ready=True,
            running=replica.num_running,
            waiting=replica.num_waiting,
        )

    def _backend(self, url: str) -> Backend:
        (name,) = [name for name, each in self.replicas.items() if each.url == url] or [None]
        if name is None or self.replicas[name].stopped_at is not None:
            return Backend(url=url, why_out="does not answer")
        return Backend(
            url=url,
            available=self.is_ready(name) and url not in self.draining and name not in self.left_out,
            draining=url in self.draining,
            num_running=self.replicas[name].num_running,
            why_out="gives wrong answers" if name in self.left_out else None,
        )


class World:
    """A controller and its fleet. With `forgetful`, each look is that of a controller that has just come back."""

    def __init__(self, plan: DeployPlan, *, forgetful: bool = False) -> None:
        self.fleet = FakeFleet()
        self.controller = Controller(
            Deployment(plan=plan, program=["serve"], router_program=["router"], api_key="k"), self.fleet
        )
        self.controller.apply(plan)
        self.forgetful = forgetful

    def run(self, seconds: float) -> None:
        """Look twice a second."""
        for _ in range(round(2 * seconds)):
            self.step()

    def step(self) -> None:
        self.fleet.now += 0.5
        self.controller.tick(self.fleet.now)
        if self.forgetful:
            saved = msgspec.json.decode(self.fleet.saved, type=Deployment)
            self.controller = Controller(saved, self.fleet)

    def model(self, name: str = "m"):
        return next(each for each in self.controller.status(self.fleet.now).models if each.name == name)


def make_plan(*, name: str = "m", model: str = "good", minimum: int = 1, maximum: int = 3, **changes) -> DeployPlan:
    plan = ModelPlan(
        name=name,
        model=model,
        replicas=ReplicaLimits(min=minimum, max=maximum),
        layout=Layout(),
        scale=ScaleRules(target_queue=1, up_after=1, down_after=5),
        serve={"device": "cpu"},
        start_timeout=60.0,
        drain_timeout=30.0,
    )
    return DeployPlan(
        models=(dataclasses.replace(plan, **changes),), router=RouterPlan(options={"policy": "round-robin"})
    )
