"""The router's numbers for Prometheus: counted in plain Python, rendered when somebody asks. Prefix `shoal_router:`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from shoal.stats import Histogram

_PREFIX = "shoal_router:"
_FIRST_TOKEN_SECONDS = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
_ADDED_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)
_REQUEST_SECONDS = (0.1, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 240.0, 480.0)


class BackendFigures(NamedTuple):
    """One server at the moment of the scrape. breaker: "closed", "half-open" or "open"."""

    url: str
    num_running: int
    outstanding_tokens: int
    alive: bool
    progressing: bool
    admitting: bool
    available: bool
    breaker: str
    num_opened: int


class PeerFigures(NamedTuple):
    """Another router. lag: seconds that the oldest news wait for it."""

    url: str
    up: bool
    num_bytes: int
    lag: float


class KeptFigures(NamedTuple):
    """The requests that clients may come back to, at the moment of the scrape. num_dropped: for want of room."""

    num_requests: int = 0
    num_bytes: int = 0
    num_dropped: int = 0
    peers: Sequence[PeerFigures] = ()


BREAKER_NUMBERS = {"closed": 0, "half-open": 1, "open": 2}


class RouterMetrics:
    """Counts what happens to requests. backends: asked at each scrape. num_waiting: in the router's own queue."""

    def __init__(self) -> None:
        self.backends: Callable[[], Iterable[BackendFigures]] = lambda: ()
        self.num_waiting: Callable[[], int] = lambda: 0
        self.finished: Counter[tuple[str, str]] = Counter()
        self.retries: Counter[str] = Counter()
        self.num_moved = 0
        self.num_replayed = 0
        self.num_tokens = 0
        self.kept: Callable[[], KeptFigures] = KeptFigures
        self.num_resumed = 0
        self.num_taken_over = 0
        self.num_rerun = 0
        self.time_to_first_token = Histogram(_FIRST_TOKEN_SECONDS)
        self.request_latency = Histogram(_REQUEST_SECONDS)
        self.added_latency = Histogram(_ADDED_SECONDS)
        self.queue_time = Histogram(_REQUEST_SECONDS)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Collector(self))
        ProcessCollector(registry=self._registry)

    def first_sent(self, seconds: float) -> None:
        """A request goes to its first backend, so long after it was admitted."""
        self.added_latency.add(seconds)

    def retried(self, reason: str) -> None:
        """An attempt failed, and another one follows."""
        self.retries[reason] += 1

    def moved(self, num_tokens: int) -> None:
        """A request goes on elsewhere, with so many tokens generated before."""
        self.num_moved += 1
        self.num_replayed += num_tokens

    def ended(self, model: str, status: int, num_tokens: int, seconds: float) -> None:
        """The answer of a request is over. status: what its client was told, at the end of its stream too; 499: it went
        away."""
        self.finished[model, str(status)] += 1
        self.num_tokens += num_tokens
        self.request_latency.add(seconds)

    def refused(self, status: int) -> None:
        """A request was not taken in."""
        self.finished["", str(status)] += 1

    def render(self) -> bytes:
        """Prometheus' text format, version 0.0.4."""
        return generate_latest(self._registry)


class _Collector(Collector):
    """Makes metric families of a RouterMetrics at the moment of the scrape."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        metrics = self._metrics
        requests = CounterMetricFamily(
            f"{_PREFIX}requests", "Requests that ended, by model and HTTP status.", labels=["model_name", "status"]
        )
        for (model, status), count in metrics.finished.items():
            requests.add_metric([model, status], count)
        yield requests
        retries = CounterMetricFamily(f"{_PREFIX}retries", "Attempts that failed, by reason.", labels=["reason"])
        for reason, count in metrics.retries.items():
            retries.add_metric([reason], count)
        yield retries
        for name, text, value in (
            ("requests_moved", "Requests that went on elsewhere in the middle of their answer.", metrics.num_moved),
            ("tokens_replayed", "Tokens that were there when a request went on elsewhere.", metrics.num_replayed),
            ("generation_tokens", "Tokens that were generated for clients.", metrics.num_tokens),
            ("requests_resumed", "Clients that came back and read on here.", metrics.num_resumed),
            ("requests_taken_over", "Requests gone on with from another router's journal.", metrics.num_taken_over),
            ("requests_rerun", "Requests whose bytes were rendered again for their client.", metrics.num_rerun),
        ):
            yield CounterMetricFamily(f"{_PREFIX}{name}", text, value=value)
        yield GaugeMetricFamily(
            f"{_PREFIX}num_requests_waiting", "Requests in the router's queue.", value=metrics.num_waiting()
        )
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From a request's arrival to its first byte.", metrics.time_to_first_token),
            ("e2e_request_latency_seconds", "From a request's arrival to its end.", metrics.request_latency),
            ("queue_time_seconds", "In the router's queue.", metrics.queue_time),
            ("added_latency_seconds", "From a request's admission to its sending to a server.", metrics.added_latency),
        ):
            family = HistogramMetricFamily(f"{_PREFIX}{name}", text)
            family.add_metric([], list(_cumulative(histogram)), histogram.total)
            yield family
        yield from self._kept()
        yield from self._backends()

    def _kept(self) -> Iterator[Metric]:
        kept = self._metrics.kept()
        for name, text, value in (
            ("kept_requests", "Requests that clients may come back to.", kept.num_requests),
            ("kept_bytes", "Memory that they take (estimate).", kept.num_bytes),
        ):
            yield GaugeMetricFamily(f"{_PREFIX}{name}", text, value=value)
        yield CounterMetricFamily(
            f"{_PREFIX}kept_requests_dropped", "Of these, dropped for want of room.", value=kept.num_dropped
        )
        up = GaugeMetricFamily(f"{_PREFIX}peer_up", "1 while the router can be told.", labels=["peer"])
        lag = GaugeMetricFamily(
            f"{_PREFIX}replication_lag_seconds", "Age of the oldest news that it was not told.", labels=["peer"]
        )
        size = CounterMetricFamily(f"{_PREFIX}replicated_bytes", "Bytes that it was sent.", labels=["peer"])
        for peer in kept.peers:
            up.add_metric([peer.url], float(peer.up))
            lag.add_metric([peer.url], peer.lag)
            size.add_metric([peer.url], peer.num_bytes)
        yield from (up, lag, size)

    def _backends(self) -> Iterator[Metric]:
        backends = list(self._metrics.backends())
        for name, text, read in (
            ("backend_requests_running", "Requests under way there.", lambda one: one.num_running),
            (
                "backend_outstanding_tokens",
                "Tokens still to compute there (estimate).",
                lambda one: one.outstanding_tokens,
            ),
            ("backend_alive", "1 while it answers.", lambda one: one.alive),
            ("backend_progressing", "1 while its requests get on.", lambda one: one.progressing),
            ("backend_admitting", "1 while it takes requests.", lambda one: one.admitting),
            ("backend_available", "1 while requests are sent there.", lambda one: one.available),
            ("backend_breaker", "0 closed, 1 half-open, 2 open.", lambda one: BREAKER_NUMBERS[one.breaker]),
        ):
            family = GaugeMetricFamily(f"{_PREFIX}{name}", text, labels=["backend"])
            for one in backends:
                family.add_metric([one.url], float(read(one)))
            yield family
        opened = CounterMetricFamily(f"{_PREFIX}backend_breaker_opened", "Times it opened.", labels=["backend"])
        for one in backends:
            opened.add_metric([one.url], one.num_opened)
        yield opened


def _cumulative(histogram: Histogram) -> Iterable[tuple[str, float]]:
    """Prometheus counts in each bucket all that is not above its bound."""
    seen = 0
    for bound, count in zip((*map(str, map(float, histogram.bounds)), "+Inf"), histogram.counts, strict=True):
        seen += count
        yield bound, seen
