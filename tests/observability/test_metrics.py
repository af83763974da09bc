"""What Prometheus reads."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal.messages import EngineStats, RankStats
from shoal.observability.metrics import EngineMetrics
from shoal.types import FinishReason


def samples(metrics: EngineMetrics) -> dict[tuple[str, str], float]:
    """(name, the label beside model_name) -> value, as Prometheus parses it; for numbers of an engine: its replica."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            if sample.name.startswith("shoal:"):
                assert sample.labels.pop("model_name") == "tiny"
                found[sample.name, next(iter(sample.labels.values()), "")] = sample.value
    return found


def test_each_replicas_numbers_have_the_names_that_dashboards_know() -> None:
    metrics = EngineMetrics("tiny")
    metrics.replicas_up = {0: True, 1: False, 2: True}
    metrics.stats[0] = EngineStats(
        num_requests_running=3, num_requests_waiting=2, kv_cache_usage=0.25, num_preemptions_total=4,
        prompt_tokens_total=50, generation_tokens_total=60, prefix_cache_queries_total=70, prefix_cache_hits_total=8,
        num_steps_total=9,
    )  # fmt: skip
    metrics.stats[1] = EngineStats(generation_tokens_total=7)
    found = samples(metrics)
    assert [found["shoal:replica_up", replica] for replica in "012"] == [1, 0, 1]
    assert [found["shoal:generation_tokens_total", replica] for replica in "012"] == [60, 7, 0]
    for name, value in (
        ("num_requests_running", 3), ("num_requests_waiting", 2), ("kv_cache_usage_perc", 0.25),
        ("num_preemptions_total", 4), ("prompt_tokens_total", 50), ("generation_tokens_total", 60),
        ("prefix_cache_queries_total", 70), ("prefix_cache_hits_total", 8), ("engine_steps_total", 9),
    ):  # fmt: skip
        assert found[f"shoal:{name}", "0"] == value


def test_bubbles_are_told_for_each_stage() -> None:
    metrics = EngineMetrics("tiny")
    metrics.replicas_up = {0: True, 1: True}
    metrics.stats[1] = EngineStats(stage_bubbles=[0.25, 0.125])
    lines = [line for line in metrics.render().decode().splitlines() if line.startswith("shoal:pipeline_bubble_perc{")]
    assert lines == [
        f'shoal:pipeline_bubble_perc{{model_name="tiny",replica="1",stage="{stage}"}} {share}'
        for stage, share in enumerate((0.25, 0.125))
    ]


def test_the_load_of_experts_is_told_where_there_are_some() -> None:
    metrics = EngineMetrics("tiny")
    metrics.stats[0] = EngineStats()
    assert b"expert" not in metrics.render()
    metrics.stats[0] = EngineStats(expert_tokens_total=[10, 0, 50, 20])
    found = [line for line in metrics.render().decode().splitlines() if line.startswith("shoal:expert_")]
    assert found == [
        *(
            f'shoal:expert_tokens_total{{expert="{expert}",model_name="tiny",replica="0"}} {count}'
            for expert, count in enumerate((10.0, 0.0, 50.0, 20.0))
        ),
        'shoal:expert_imbalance{model_name="tiny",replica="0"} 2.5',
    ]


def test_ranks_are_told_each_and_grow_older_while_their_core_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("shoal.observability.metrics.time.monotonic", lambda: now)
    metrics = EngineMetrics("tiny", "vllm")
    ranks = [RankStats(0, 7, 50, 0.25, 1.5, 1000, 2000), RankStats(1, 6, 49, 3.0, 9.5, 1001, 0)]
    metrics.take_stats(EngineStats(num_requests_running=1, ranks=ranks), 0)

    def told() -> list[str]:
        lines = metrics.render().decode().splitlines()
        return [line.partition("rank_")[2] for line in lines if line.startswith("vllm:rank_")]

    labels = [f'{{model_name="tiny",rank="{rank}",replica="0"' for rank in (0, 1)]
    assert f"seconds_since_progress{labels[1]}}} 3.0" in told()
    assert f"steps_total{labels[1]}}} 6.0" in told() and f"collectives_total{labels[0]}}} 50.0" in told()
    assert f"collective_seconds_total{labels[1]}}} 9.5" in told()
    assert sorted(line for line in told() if line.startswith("memory_bytes")) == [
        'memory_bytes{kind="device",model_name="tiny",rank="0",replica="0"} 2000.0',
        'memory_bytes{kind="device",model_name="tiny",rank="1",replica="0"} 0.0',
        'memory_bytes{kind="host",model_name="tiny",rank="0",replica="0"} 1000.0',
        'memory_bytes{kind="host",model_name="tiny",rank="1",replica="0"} 1001.0',
    ]
    now = 104.0
    assert f"seconds_since_progress{labels[1]}}} 7.0" in told()
    metrics.take_stats(EngineStats(ranks=ranks), 0)
    now = 200.0
    assert f"seconds_since_progress{labels[1]}}} 3.0" in told(), "without work nothing is late"


def test_histograms_are_cumulative() -> None:
    metrics = EngineMetrics("tiny")
    for seconds in (0.003, 0.003, 0.6, 1000.0):
        metrics.time_to_first_token.add(seconds)
    found = samples(metrics)
    name = "shoal:time_to_first_token_seconds"
    assert [found[f"{name}_bucket", bound] for bound in ("0.001", "0.005", "0.75", "160.0", "+Inf")] == [0, 2, 3, 3, 4]
    assert found[f"{name}_count", ""] == 4
    assert found[f"{name}_sum", ""] == 1000.606
    counts = [value for (key, _), value in found.items() if key == f"{name}_bucket"]
    assert counts == sorted(counts)


def test_endings_are_counted_by_reason() -> None:
    metrics = EngineMetrics("tiny")
    metrics.request_finished(FinishReason.STOP, 10, 5, 1.5)
    metrics.request_finished(FinishReason.ABORT, 20, 0, 0.1)
    found = samples(metrics)
    by_reason = {reason: found["shoal:request_success_total", reason] for reason in map(str, FinishReason)}
    assert by_reason == {"stop": 1, "length": 0, "abort": 1, "error": 0}
    assert found["shoal:e2e_request_latency_seconds_count", ""] == 2
    assert found["shoal:request_prompt_tokens_sum", ""] == 30
    assert found["shoal:request_generation_tokens_sum", ""] == 5


def test_restarts_and_what_went_on_are_counted() -> None:
    metrics = EngineMetrics("tiny")
    metrics.num_restarts, metrics.num_requests_continued, metrics.num_tokens_replayed = 1, 20, 300
    found = samples(metrics)
    names = ("engine_restarts", "requests_continued", "tokens_replayed")
    assert [found[f"shoal:{name}_total", ""] for name in names] == [1, 20, 300]


def test_two_engines_in_one_process_do_not_meet() -> None:
    one, other = EngineMetrics("tiny"), EngineMetrics("tiny")
    one.request_finished(FinishReason.STOP, 1, 1, 1.0)
    assert samples(other)["shoal:request_success_total", "stop"] == 0
