"""What a look at the world found: of each replica what its actor says and what the router does with it."""

from __future__ import annotations

from collections.abc import Mapping

from shoal.cluster.deploy.fleet import Backend, Fleet
from shoal.cluster.deploy.records import ReplicaRecord, Report
from shoal.cluster.deploy.rollout import View
from shoal.cluster.deploy.scaling import Load


class Picture:
    """reports: None for an actor that is gone. router: None where there is none. backends: None: it does not answer."""

    def __init__(
        self,
        reports: dict[str, Report | None] | None = None,
        router: Report | None = None,
        backends: Mapping[str, Backend] | None = None,
    ) -> None:
        self.reports = reports or {}
        self.router = router
        self.backends = backends

    @classmethod
    def take(cls, fleet: Fleet, names: list[str]) -> Picture:
        reports, router = fleet.reports(names), fleet.router()
        return cls(reports, router, fleet.backends() if router is not None else None)

    def report(self, name: str) -> Report:
        """Of one that is there, or was asked for just now."""
        return self.reports.get(name) or Report()

    def is_serving(self, record: ReplicaRecord) -> bool:
        """Whether it is ready, and the router sends requests to it."""
        report = self.report(record.name)
        if report.state != "ready" or report.url is None or self.backends is None:
            return False
        backend = self.backends.get(report.url)
        return backend is not None and backend.available

    def why_not(self, record: ReplicaRecord) -> str:
        """Why it does not serve; "" when it does."""
        report = self.report(record.name)
        if report.state != "ready":
            return report.why
        if self.backends is None:
            return "the router does not answer"
        backend = self.backends.get(report.url or "")
        if backend is None:
            return "the router does not know it yet"
        return "" if backend.available else f"the router leaves it out: {backend.why_out}"

    def may_be_routed(self, url: str) -> bool:
        """Whether the router may still send requests there."""
        return self.backends is None or url in self.backends

    def load(self, name: str) -> Load:
        report = self.report(name)
        return Load(waiting=report.waiting, running=report.running, kv_usage=report.kv_usage)

    def view(self, record: ReplicaRecord, now: float) -> View:
        report = self.report(record.name)
        return View(
            name=record.name,
            revision=record.revision,
            phase=record.phase,
            serving=self.is_serving(record),
            was_serving=record.served,
            age=now - record.created,
            num_early_ends=report.num_early_ends,
            running=report.running + report.waiting,
            why=self.why_not(record),
        )
