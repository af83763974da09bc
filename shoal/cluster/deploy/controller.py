"""The controller of a deployment: looks at all replicas, decides, and does the next step, over and over.

It is told the time and sees the world through a Fleet. All that it must remember is a Deployment, saved before the
world is changed, so that a controller that comes back starts nothing twice.
"""

from __future__ import annotations

import msgspec

from shoal.cluster.deploy.fleet import Fleet
from shoal.cluster.deploy.launches import replica_grace, replica_launch, resources, router_content, router_launch
from shoal.cluster.deploy.picture import Picture
from shoal.cluster.deploy.records import Deployment, DeployStatus, ModelRecord, ReplicaRecord, Report
from shoal.cluster.deploy.rollout import plan_steps
from shoal.cluster.deploy.scaling import History, decide
from shoal.cluster.deploy.status import describe
from shoal.config.deploy_file import DeployPlan, ModelPlan
from shoal.errors import ConfigError
from shoal.log import get_logger

# What did not come up although it is what ran before (no room, a broken node) is tried again after this.
RETRY_SECONDS = 30.0
# Beyond its grace an actor that says nothing of its end is ended by force.
_BEYOND_GRACE_SECONDS = 15.0

logger = get_logger(__name__)


class Controller:
    def __init__(self, deployment: Deployment, fleet: Fleet) -> None:
        self.state = deployment
        self.fleet = fleet
        self._saved = b""
        self._picture = Picture()
        self._settled: dict[str, bool] = {}
        # Models of which no replica is added for a while: until when, and why.
        self._holds: dict[str, tuple[float, str]] = {}
        self._stopped = False

    # --- what it is told -------------------------------------------------------------------------------------------

    def apply(self, plan: DeployPlan) -> None:
        """Have this from now on. Raises ConfigError for what a running deployment cannot change."""
        if self.state.stopping:
            raise ConfigError("the deployment is being stopped; deploy again once `shoal deploy stop` is done")
        old, new = self.state.plan.router, plan.router
        if self.state.models and (old.host, old.port) != (new.host, new.port):
            raise ConfigError(
                f"the router listens on {old.host}:{old.port}; to have it on {new.host}:{new.port}, "
                "`shoal deploy stop` first"
            )
        self.state.plan = plan
        models = {model.name: model for model in plan.models}
        for name, model in models.items():
            record = self.state.models.get(name)
            if record is None:
                self.state.models[name] = ModelRecord(plan=model, history=History(wanted=model.replicas.min))
                continue
            record.plan, record.failure = model, ""
            if record.stable is not None and record.stable.revision == model.revision:
                record.stable = model  # what differs, running replicas take over
            self._holds.pop(name, None)
        for name, record in self.state.models.items():
            if name not in models:
                record.plan, record.failure = None, ""
            self._settled[name] = False
        self._save()

    def begin_stop(self) -> None:
        """All of it goes: first the router, which lets its requests finish, then the replicas."""
        self.state.stopping = True
        self._save()

    def status(self, now: float) -> DeployStatus:
        """As of the last look."""
        return describe(self.state, self._picture, self._settled, now, stopped=self._stopped)

    # --- one look, and the next step ---------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        self._look(now)
        if self.state.stopping:
            self._stop(now)
        else:
            for name, record in list(self.state.models.items()):
                self._advance(name, record, now)
        self._let_go(now)
        self._save()
        if not self.state.stopping:
            self._publish()
        self._carry_out()

    def _look(self, now: float) -> None:
        self._picture = Picture.take(self.fleet, list(self.state.replicas))
        for name, record in list(self.state.replicas.items()):
            if self._picture.reports.get(name) is None:
                logger.warning("%s is gone, with its actor", name)
                del self.state.replicas[name]
            elif self._picture.is_serving(record):
                record.served = True

    def _advance(self, name: str, record: ModelRecord, now: float) -> None:
        """One model: how many it needs, and what follows."""
        target = record.plan
        views = [self._picture.view(each, now) for each in self.state.replicas.values() if each.model == name]
        if target is not None:
            loads = [self._picture.load(view.name) for view in views if view.phase == "up" and view.serving]
            decision = decide(now, loads, target.replicas, target.scale, record.history)
            if decision.wanted != record.history.wanted:
                logger.info("%s: %d replicas, as %s", name, decision.wanted, decision.why)
            record.history, record.why = decision.history, decision.why
        steps = plan_steps(
            views,
            target.revision if target is not None else None,
            record.history.wanted,
            minimum=target.replicas.min if target is not None else 0,
            start_timeout=target.start_timeout if target is not None else 0.0,
        )
        self._settled[name] = steps.settled
        if steps.failure and target is not None:
            self._give_up(name, record, target, steps.failed, steps.failure, now)
        for replica in steps.drain:
            self._take_out(self.state.replicas[replica], now)
        if target is not None:
            if steps.stands:
                record.stable = target
            until, held = self._holds.get(name, (0.0, ""))
            if now < until:
                record.why = f"{record.why}; none is added for {until - now:.0f} s, since {held}"
            elif steps.num_start:
                self._holds.pop(name, None)
                for _ in range(steps.num_start):
                    self._add(name, target, now)
        elif steps.settled and (self.state.stopping or not record.failure):
            del self.state.models[name]

    def _give_up(
        self, name: str, record: ModelRecord, target: ModelPlan, failed: tuple[str, ...], why: str, now: float
    ) -> None:
        """A replica did not come up. A plan that never was is taken back; one that stands is tried again later."""
        for replica in failed:
            self._take_out(self.state.replicas[replica], now)
        if record.stable is not None and record.stable.revision == target.revision:
            self._holds[name] = now + RETRY_SECONDS, why
            logger.error("%s: %s; the next try is in %g s", name, why, RETRY_SECONDS)
            return
        record.failure = why
        record.plan = record.stable
        logger.error("%s: %s; %s", name, why, "what ran before stays" if record.stable else "it is given up")

    def _add(self, model: str, plan: ModelPlan, now: float) -> None:
        name = f"{model}-{self.state.next_number}"
        self.state.next_number += 1
        self.state.replicas[name] = ReplicaRecord(
            name=name, model=model, revision=plan.revision, created=now, since=now
        )

    def _take_out(self, record: ReplicaRecord, now: float) -> None:
        if record.phase == "up":
            record.phase, record.since = "draining", now

    # --- going -------------------------------------------------------------------------------------------------------

    def _let_go(self, now: float) -> None:
        """Those that are drained get SIGTERM when nothing runs there; those that have ended are forgotten."""
        for name, record in list(self.state.replicas.items()):
            report = self._picture.report(name)
            if record.phase == "draining" and (why := self._why_end(record, report, now)):
                logger.info("%s ends: %s", name, why)
                record.phase, record.since, record.why = "stopping", now, why
            elif record.phase == "stopping" and self._has_ended(record, report, now):
                self.fleet.remove(name)
                del self.state.replicas[name]

    def _has_ended(self, record: ReplicaRecord, report: Report, now: float) -> bool:
        """Or was nowhere yet, or does not end by itself."""
        end = record.since + replica_grace(self._newest_plan(record.model)) + _BEYOND_GRACE_SECONDS
        return report.state == "stopped" or not report.node or now > end

    def _why_end(self, record: ReplicaRecord, report: Report, now: float) -> str:
        """Why a drained replica may be ended now; "" while it may not."""
        if not record.served and not report.was_ready:
            return "it was not up"
        plan = self._newest_plan(record.model)
        drain_timeout = plan.drain_timeout if plan is not None else ModelPlan.drain_timeout
        if now - record.since > drain_timeout:
            return f"it was drained for {drain_timeout:g} s, and requests still run there"
        is_routed = report.url is not None and self._picture.may_be_routed(report.url)
        running = self.fleet.drain(report.url) if is_routed and report.url is not None else None
        if running is None:  # no router, or one that does not know it: the server's own word
            running = report.running + report.waiting
        return "nothing runs there" if running == 0 else ""

    def _stop(self, now: float) -> None:
        router = self._picture.router
        if router is not None and router.state != "stopped":
            self.fleet.stop_router()
            return
        if router is not None:
            self.fleet.remove_router()
        for record in self.state.replicas.values():
            if record.phase != "stopping":
                record.phase, record.since, record.why = "stopping", now, "the deployment ends"
        self._stopped = not self.state.replicas and router is None

    # --- the world ---------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Before anything is started: whoever comes back looks for what is written here."""
        kept = msgspec.json.decode(msgspec.json.encode(self.state), type=Deployment)
        for record in kept.models.values():
            record.history = History(wanted=record.history.wanted, capacity=record.history.capacity)
            record.why = ""
        encoded = msgspec.json.encode(kept)
        if encoded != self._saved:
            self.fleet.save(encoded)
            self._saved = encoded

    def _carry_out(self) -> None:
        """Starts and ends, as the records have them. Both may be asked for again and again."""
        for name, record in self.state.replicas.items():
            if record.phase == "stopping":
                self.fleet.stop(name)
            elif record.phase == "up" and (plan := self._plan_of(record)) is not None:
                num_gpus, num_cpus = resources(plan, has_gpus=self.fleet.has_gpus())
                launch = replica_launch(self.state, plan, takes_gpus=num_gpus > 0)
                self.fleet.start(name, launch, num_cpus=num_cpus, num_gpus=num_gpus)

    def _publish(self) -> None:
        urls = {
            name: url
            for name, record in self.state.replicas.items()
            if record.phase != "stopping" and (url := self._picture.report(name).url) is not None
        }
        text = router_content(self.state, urls)
        if text is not None:
            router = self.state.plan.router
            self.fleet.publish(text, router.host, router.port, self.state.admin_key, router_launch(self.state))

    def _plan_of(self, record: ReplicaRecord) -> ModelPlan | None:
        model = self.state.models.get(record.model)
        plans = (model.plan, model.stable) if model is not None else ()
        return next((plan for plan in plans if plan is not None and plan.revision == record.revision), None)

    def _newest_plan(self, model: str) -> ModelPlan | None:
        record = self.state.models.get(model)
        return (record.plan or record.stable) if record is not None else None
