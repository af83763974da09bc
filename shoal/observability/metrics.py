"""The engine's numbers for Prometheus: counted in plain Python while it works, rendered when somebody asks.

Names are those that dashboards of vLLM know, with the prefix `shoal:` or, so that such dashboards work as they are,
`vllm:` (--metrics-prefix). The server feeds it and serves /metrics.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from shoal.messages import EngineStats
from shoal.stats import Histogram
from shoal.types.outputs import FinishReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
_BETWEEN_TOKENS_SECONDS = (
    0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
_REQUEST_SECONDS = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class EngineMetrics:
    """Counts what happens to requests.

    stats: the newest report of each engine core, by replica (`take_stats`). replicas_up: whether each is there.
    num_restarts, num_requests_continued, num_tokens_replayed: of engine cores that were lost, and what went on then.
    """

    def __init__(self, model_name: str, prefix: str = "shoal") -> None:
        self.model_name = model_name
        self.prefix = prefix
        self.stats: dict[int, EngineStats] = {}
        self._stats_times: dict[int, float] = {}
        self.replicas_up: dict[int, bool] = {0: True}
        self.num_restarts = 0
        self.num_requests_continued = 0
        self.num_tokens_replayed = 0
        self.time_to_first_token = Histogram(_FIRST_TOKEN_SECONDS)
        self.inter_token_latency = Histogram(_BETWEEN_TOKENS_SECONDS)
        self.request_latency = Histogram(_REQUEST_SECONDS)
        self.prompt_tokens = Histogram(_TOKENS)
        self.generation_tokens = Histogram(_TOKENS)
        self.finished: Counter[FinishReason] = Counter()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_EngineCollector(self))
        ProcessCollector(registry=self._registry)

    def take_stats(self, stats: EngineStats, replica: int) -> None:
        """A core has told its numbers."""
        self.stats[replica] = stats
        self._stats_times[replica] = time.monotonic()

    def stats_age(self, replica: int) -> float:
        """Seconds since a core told its numbers; 0 while it never has."""
        return time.monotonic() - self._stats_times.get(replica, time.monotonic())

    def request_finished(
        self, reason: FinishReason, num_prompt_tokens: int, num_generation_tokens: int, seconds: float
    ) -> None:
        """One answer has ended, `seconds` after it was queued."""
        self.finished[reason] += 1
        self.request_latency.add(seconds)
        self.prompt_tokens.add(num_prompt_tokens)
        self.generation_tokens.add(num_generation_tokens)

    def render(self) -> bytes:
        """Prometheus' text format, version 0.0.4."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Makes metric families of an EngineMetrics at the moment of the scrape."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        up = self._metrics.replicas_up
        stats = {replica: self._metrics.stats.get(replica) or EngineStats() for replica in up}
        yield self._gauge("replica_up", "1 while the replica is there.", {replica: int(up[replica]) for replica in up})
        for name, field, text in (
            ("num_requests_running", "num_requests_running", "Requests that are being generated."),
            ("num_requests_waiting", "num_requests_waiting", "Requests that are queued."),
            ("kv_cache_usage_perc", "kv_cache_usage", "Share of the KV cache in use; 1 is all of it."),
        ):
            yield self._gauge(name, text, {replica: getattr(own, field) for replica, own in stats.items()})
        for name, field, text in (
            ("prompt_tokens", "prompt_tokens_total", "Prompt tokens taken in."),
            ("generation_tokens", "generation_tokens_total", "Tokens generated."),
            ("prefix_cache_queries", "prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."),
            ("prefix_cache_hits", "prefix_cache_hits_total", "Prompt tokens found in the prefix cache."),
            ("num_preemptions", "num_preemptions_total", "Requests set back to be computed again."),
            ("engine_steps", "num_steps_total", "Steps of the engine."),
        ):
            yield self._counter(name, text, {replica: getattr(own, field) for replica, own in stats.items()})
        yield self._bubbles(stats)
        yield from self._ranks(stats)
        yield from self._experts(stats)
        yield self._successes()
        for name, value, text in (
            ("engine_restarts", self._metrics.num_restarts, "Engine cores that were lost and came back."),
            ("requests_continued", self._metrics.num_requests_continued, "Answers that went on after such a loss."),
            ("tokens_replayed", self._metrics.num_tokens_replayed, "Tokens that were told again for them."),
        ):
            family = CounterMetricFamily(f"{self._metrics.prefix}:{name}", text, labels=["model_name"])
            family.add_metric([self._metrics.model_name], value)
            yield family
        metrics = self._metrics
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From queueing to the first token.", metrics.time_to_first_token),
            ("inter_token_latency_seconds", "From one token to the next.", metrics.inter_token_latency),
            ("e2e_request_latency_seconds", "From queueing to the end.", metrics.request_latency),
            ("request_prompt_tokens", "Prompt tokens of a request.", metrics.prompt_tokens),
            ("request_generation_tokens", "Generated tokens of a request.", metrics.generation_tokens),
        ):
            yield self._histogram(name, text, histogram)

    def _gauge(self, name: str, text: str, values: Mapping[int, float]) -> Metric:
        family = GaugeMetricFamily(f"{self._metrics.prefix}:{name}", text, labels=["model_name", "replica"])
        for replica, value in values.items():
            family.add_metric([self._metrics.model_name, str(replica)], value)
        return family

    def _counter(self, name: str, text: str, values: Mapping[int, float]) -> Metric:
        family = CounterMetricFamily(f"{self._metrics.prefix}:{name}", text, labels=["model_name", "replica"])
        for replica, value in values.items():
            family.add_metric([self._metrics.model_name, str(replica)], value)
        return family

    def _bubbles(self, stats: Mapping[int, EngineStats]) -> Metric:
        family = GaugeMetricFamily(
            f"{self._metrics.prefix}:pipeline_bubble_perc",
            "Share of the time with steps in flight in which a pipeline stage computed nothing; 1 is all of it.",
            labels=["model_name", "replica", "stage"],
        )
        for replica, own in stats.items():
            for stage, share in enumerate(own.stage_bubbles):
                family.add_metric([self._metrics.model_name, str(replica), str(stage)], share)
        return family

    def _ranks(self, stats: Mapping[int, EngineStats]) -> Iterator[Metric]:
        """What a dashboard needs to find the rank that holds up all others."""
        prefix, labels = self._metrics.prefix, ["model_name", "replica", "rank"]
        since = GaugeMetricFamily(
            f"{prefix}:rank_seconds_since_progress",
            "Since the rank went from one step or collective to the next, as far as is known.",
            labels=labels,
        )
        steps = CounterMetricFamily(f"{prefix}:rank_steps", "Steps that the rank has begun.", labels=labels)
        collectives = CounterMetricFamily(f"{prefix}:rank_collectives", "Collectives that it entered.", labels=labels)
        seconds = CounterMetricFamily(
            f"{prefix}:rank_collective_seconds",
            "Time of the rank's host inside of collectives (on a GPU they are queued there, which takes none).",
            labels=labels,
        )
        memory = GaugeMetricFamily(
            f"{prefix}:rank_memory_bytes", "Memory that the rank's process holds.", labels=[*labels, "kind"]
        )
        for replica, own in stats.items():
            # A core that is stuck tells nothing: what it told last grows older.
            age = self._metrics.stats_age(replica) if own.num_requests_running + own.num_requests_waiting else 0.0
            for rank in own.ranks:
                values = [self._metrics.model_name, str(replica), str(rank.rank)]
                since.add_metric(values, rank.seconds_since_progress + age)
                steps.add_metric(values, rank.num_steps_total)
                collectives.add_metric(values, rank.num_collectives_total)
                seconds.add_metric(values, rank.collective_seconds_total)
                for kind, num_bytes in (("host", rank.host_bytes), ("device", rank.device_bytes)):
                    memory.add_metric([*values, kind], num_bytes)
        yield from (since, steps, collectives, seconds, memory)

    def _experts(self, stats: Mapping[int, EngineStats]) -> Iterator[Metric]:
        """Of a mixture of experts: what each got, and how uneven that is."""
        if not any(own.expert_tokens_total for own in stats.values()):
            return
        prefix, labels = self._metrics.prefix, ["model_name", "replica"]
        tokens = CounterMetricFamily(
            f"{prefix}:expert_tokens", "Tokens routed to the expert, in all layers.", labels=[*labels, "expert"]
        )
        imbalance = GaugeMetricFamily(
            f"{prefix}:expert_imbalance",
            "Tokens of the expert that got most, as a multiple of the mean; 1 is even.",
            labels=labels,
        )
        for replica, own in stats.items():
            values, counts = [self._metrics.model_name, str(replica)], own.expert_tokens_total
            for expert, count in enumerate(counts):
                tokens.add_metric([*values, str(expert)], count)
            if total := sum(counts):
                imbalance.add_metric(values, max(counts) * len(counts) / total)
        yield from (tokens, imbalance)

    def _successes(self) -> Metric:
        family = CounterMetricFamily(
            f"{self._metrics.prefix}:request_success",
            "Requests that ended, by reason.",
            labels=["model_name", "finished_reason"],
        )
        for reason in FinishReason:
            family.add_metric([self._metrics.model_name, str(reason)], self._metrics.finished[reason])
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(f"{self._metrics.prefix}:{name}", text, labels=["model_name"])
        family.add_metric([self._metrics.model_name], list(_cumulative(histogram)), histogram.total)
        return family


def _cumulative(histogram: Histogram) -> Iterable[tuple[str, float]]:
    """Prometheus counts in each bucket all that is not above its bound."""
    seen = 0
    for bound, count in zip((*map(str, map(float, histogram.bounds)), "+Inf"), histogram.counts, strict=True):
        seen += count
        yield bound, seen
