"""MetricsObserver: what AsyncEngine tells, counted by EngineMetrics. One addition per token."""

from __future__ import annotations

from shoal.engine.observer import EngineObserver
from shoal.engine.prepare import PreparedRequest
from shoal.messages import EngineStats
from shoal.observability.metrics import EngineMetrics
from shoal.types.outputs import FinishReason


class MetricsObserver(EngineObserver):
    """Pass it to AsyncEngine, and its `metrics` to create_app."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self.metrics = metrics

    def first_token(self, request: PreparedRequest, index: int, seconds: float) -> None:
        self.metrics.time_to_first_token.add(seconds)

    def tokens(self, request: PreparedRequest, index: int, num_tokens: int, seconds: float) -> None:
        self.metrics.inter_token_latency.add(seconds / num_tokens)

    def finished(
        self, request: PreparedRequest, index: int, reason: FinishReason, num_tokens: int, seconds: float
    ) -> None:
        self.metrics.request_finished(reason, request.num_prompt_tokens, num_tokens, seconds)

    def stats(self, stats: EngineStats, replica: int) -> None:
        self.metrics.take_stats(stats, replica)
