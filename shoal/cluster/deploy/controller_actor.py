"""The controller as an actor: Ray starts it again when it dies, and it goes on from what it had saved."""

from __future__ import annotations

import threading
import time

import msgspec

from shoal import log
from shoal.cluster.deploy.controller import Controller
from shoal.cluster.deploy.ray_fleet import RayFleet, load_state
from shoal.cluster.deploy.records import Deployment, DeployStatus
from shoal.config.deploy_file import DeployPlan
from shoal.errors import ConfigError
from shoal.log import get_logger

CONTROLLER = "controller"
_TICK_SECONDS = 0.5
# What passes by itself is no failure of the deployment.
_FAILED_TICKS = 20

logger = get_logger(__name__)


class ControllerActor:
    """One thread ticks; calls take turns with it."""

    def __init__(self, first: bytes, router_node: str) -> None:
        """first: the deployment as it begins; one that was saved counts instead of it."""
        log.configure(role="deploy")
        saved = load_state()
        deployment = msgspec.json.decode(saved or first, type=Deployment)
        self._lock = threading.Lock()
        self._controller = Controller(deployment, RayFleet(router_node))
        self._failure = ""
        self._num_failed = 0
        threading.Thread(target=self._run, name="controller", daemon=True).start()

    def apply(self, plan: bytes) -> str:
        """Have this plan from now on. Returns why it cannot be; "" when it can."""
        with self._lock:
            try:
                self._controller.apply(DeployPlan.decode(plan))
            except ConfigError as error:
                return str(error)
        return ""

    def status(self) -> bytes:
        with self._lock:
            status = self._controller.status(time.time())
        status.failure = status.failure or self._failure
        return msgspec.json.encode(status)

    def begin_stop(self) -> None:
        with self._lock:
            self._controller.begin_stop()

    def _run(self) -> None:
        while True:
            began = time.monotonic()
            with self._lock:
                stopped = self._tick()
            if stopped:
                return  # what is saved says so, until the actor is removed
            time.sleep(max(0.05, _TICK_SECONDS - (time.monotonic() - began)))

    def _tick(self) -> bool:
        """Whether nothing is left."""
        try:
            self._controller.tick(time.time())
            self._num_failed, self._failure = 0, ""
        except Exception as error:
            # The next look may find what this one did not.
            logger.exception("the controller could not do its work")
            self._num_failed += 1
            if self._num_failed >= _FAILED_TICKS:
                self._failure = f"the controller could not do its work: {error!r}"
            return False
        status: DeployStatus = self._controller.status(time.time())
        return status.stopped
