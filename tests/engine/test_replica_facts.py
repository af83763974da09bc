"""Several cores' words made into one's."""

from __future__ import annotations

from shoal.engine.replica_facts import (
    CombinedProgress,
    combine_ready,
    combine_stats,
    stats_of_the_lost,
    with_counters,
)
from shoal.messages import CoreReady, EngineStats, RankStats, StartupProgress


def test_stats_add_up_and_the_usage_is_that_of_all_blocks() -> None:
    one = EngineStats(
        num_requests_running=1, num_requests_waiting=2, kv_cache_usage=0.9, num_blocks=100, num_free_blocks=10,
        num_steps_total=5, num_preemptions_total=1, prompt_tokens_total=7, generation_tokens_total=8,
        prefix_cache_queries_total=9, prefix_cache_hits_total=3, seconds_since_last_step=0.5,
        stage_bubbles=[0.25, 0.5], ranks=[RankStats(0, 5, 9, 0.1, 0.2, 1000, 2000)], seconds_without_progress=1.5,
        expert_tokens_total=[4, 0, 7],
    )  # fmt: skip
    other = EngineStats(num_requests_running=3, num_blocks=300, num_free_blocks=290, seconds_since_last_step=2.0)
    for name in EngineStats.__struct_fields__:
        assert getattr(one, name), f"give {name} a value here, so that it is seen to be combined"
    combined = combine_stats([one, other])
    assert (combined.num_requests_running, combined.num_requests_waiting, combined.num_steps_total) == (4, 2, 5)
    assert combined.kv_cache_usage == 0.25
    assert combined.seconds_since_last_step == 2.0 and combined.seconds_without_progress == 1.5
    assert (combined.prompt_tokens_total, combined.generation_tokens_total) == (7, 8)
    assert combined.stage_bubbles == [0.25, 0.5] and combined.expert_tokens_total == [4, 0, 7]
    other.stage_bubbles = [0.75, 1.0]
    assert combine_stats([one, other]).stage_bubbles == [0.5, 0.75]
    assert combined.ranks == [], "they are told for each replica alone"
    one.ranks = []
    assert combine_stats([one]) == one
    assert combine_stats([]) == EngineStats()


def test_a_lost_core_keeps_its_counters_only() -> None:
    last = EngineStats(
        num_requests_running=1, num_requests_waiting=2, kv_cache_usage=0.9, num_blocks=10, num_free_blocks=1,
        num_steps_total=5, generation_tokens_total=8, stage_bubbles=[0.5],
        seconds_since_last_step=3.0, seconds_without_progress=3.0, ranks=[RankStats(0, 5, 9, 0.1, 0.2, 1000, 2000)],
    )  # fmt: skip
    assert stats_of_the_lost(last) == EngineStats(num_steps_total=5, generation_tokens_total=8)


def test_counters_go_on_where_an_earlier_core_left_them() -> None:
    now = EngineStats(num_requests_running=1, num_steps_total=5, generation_tokens_total=8, kv_cache_usage=0.5)
    earlier = EngineStats(num_requests_running=7, num_steps_total=10, num_preemptions_total=2, kv_cache_usage=0.9)
    assert with_counters(now, earlier) == EngineStats(
        num_requests_running=1, num_steps_total=15, num_preemptions_total=2, generation_tokens_total=8,
        kv_cache_usage=0.5,
    )  # fmt: skip


def test_ready_is_what_all_of_them_can_do() -> None:
    several = [
        CoreReady(1, 512, 65, 16, {"device": "GPU 0", "kv_cache_bytes": 10, "load_seconds": 3.0, "hosts": ["a", "b"]}),
        CoreReady(1, 256, 33, 16, {"device": "GPU 1", "kv_cache_bytes": 5, "load_seconds": 4.0, "hosts": ["b", "c"]}),
    ]
    ready = combine_ready(several)
    assert (ready.generation, ready.max_model_len, ready.block_size) == (1, 256, 16)
    assert (ready.num_blocks - 1) * 16 == 64 * 16 + 32 * 16, "the tokens of both caches"
    assert ready.info["device"] == "GPU 0, GPU 1" and combine_ready([several[0]] * 2).info["device"] == "GPU 0"
    assert ready.info["hosts"] == ["a", "b", "c"]
    assert ready.info["kv_cache_bytes"] == 15 and ready.info["load_seconds"] == 4.0
    assert ready.info["replicas"] == [one.info for one in several]


def test_progress_is_the_slowests_phase_with_the_bytes_of_all() -> None:
    progress = CombinedProgress(2)
    assert progress.add(0, StartupProgress("load", 10, 100)) is None, "the other one has not begun"
    assert progress.add(1, StartupProgress("load", 0, 100)) == StartupProgress("load", 10, 200)
    assert progress.add(0, StartupProgress("load", 90, 100)) == StartupProgress("load", 90, 200)
    # The first is done with it, though it did not say so.
    assert progress.add(0, StartupProgress("warm up")) == StartupProgress("load", 100, 200)
    assert progress.add(1, StartupProgress("load", 60, 100)) == StartupProgress("load", 160, 200)
    assert progress.add(1, StartupProgress("warm up")) == StartupProgress("warm up", 0, 0)
