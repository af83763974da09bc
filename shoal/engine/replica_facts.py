"""What several engine cores say of themselves, made into what one would say. Used by replicas.py and AsyncEngine."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from shoal.messages import CoreReady, EngineStats, StartupProgress

# Facts of CoreReady.info that add up over the replicas, and those of which the largest counts.
_SUMS = ("num_blocks", "weight_bytes", "kv_cache_bytes", "kv_cache_tokens", "max_full_requests", "ranks")
_LARGEST = ("load_seconds", "startup_seconds")
_NO_SUMS = (
    "kv_cache_usage",
    "seconds_since_last_step",
    "stage_bubbles",
    "ranks",
    "seconds_without_progress",
    "expert_tokens_total",
)


def combine_stats(several: Iterable[EngineStats]) -> EngineStats:
    """Counts and counters add up; the usage is that of all blocks, the last step that of the slowest, a stage's bubble
    the mean of the replicas that told theirs. Ranks are told for each replica alone."""
    all_stats = list(several)
    sums = {
        name: sum(getattr(stats, name) for stats in all_stats)
        for name in EngineStats.__struct_fields__
        if name not in _NO_SUMS
    }
    combined = EngineStats(**sums)
    if combined.num_blocks:
        combined.kv_cache_usage = 1.0 - combined.num_free_blocks / combined.num_blocks
    combined.seconds_since_last_step = max((stats.seconds_since_last_step for stats in all_stats), default=0.0)
    combined.seconds_without_progress = max((stats.seconds_without_progress for stats in all_stats), default=0.0)
    bubbles = [stats.stage_bubbles for stats in all_stats if stats.stage_bubbles]
    combined.expert_tokens_total = _add_lists(*(stats.expert_tokens_total for stats in all_stats))
    combined.stage_bubbles = [sum(shares) / len(bubbles) for shares in zip(*bubbles, strict=True)]
    return combined


def with_counters(stats: EngineStats, earlier: EngineStats) -> EngineStats:
    """These stats, with what was counted earlier: counters do not go back when a core is replaced."""
    names = [name for name in EngineStats.__struct_fields__ if name.endswith("_total") and name not in _NO_SUMS]
    sums: dict[str, Any] = {name: getattr(stats, name) + getattr(earlier, name) for name in names}
    experts = _add_lists(stats.expert_tokens_total, earlier.expert_tokens_total)
    return msgspec.structs.replace(stats, **sums, expert_tokens_total=experts)


def _add_lists(*lists: Sequence[int]) -> list[int]:
    """Number by number; those that are missing count as 0."""
    return [sum(numbers) for numbers in itertools.zip_longest(*lists, fillvalue=0)]


def stats_of_the_lost(last: EngineStats) -> EngineStats:
    """A core that is gone holds nothing; what it has counted stays counted."""
    return msgspec.structs.replace(
        last,
        num_requests_running=0,
        num_requests_waiting=0,
        kv_cache_usage=0.0,
        num_blocks=0,
        num_free_blocks=0,
        seconds_since_last_step=0.0,
        stage_bubbles=[],
        ranks=[],
        seconds_without_progress=0.0,
    )


def combine_ready(several: Sequence[CoreReady]) -> CoreReady:
    """The cache of all of them; a request must fit each. `info["replicas"]` has each one's own facts."""
    infos = [ready.info for ready in several]
    info: dict[str, Any] = dict(infos[0])
    for names, combine in ((_SUMS, sum), (_LARGEST, max)):
        info |= {name: combine(own[name] for own in infos) for name in names if all(name in own for own in infos)}
    info["device"] = ", ".join(dict.fromkeys(str(own["device"]) for own in infos if "device" in own))
    if any("hosts" in own for own in infos):
        info["hosts"] = list(dict.fromkeys(host for own in infos for host in own.get("hosts", ())))
    info.pop("weight_bytes_by_rank", None)
    info["replicas"] = infos
    return CoreReady(
        generation=several[0].generation,
        max_model_len=min(ready.max_model_len for ready in several),
        # Each has one block that holds no tokens; so has the sum.
        num_blocks=sum(ready.num_blocks - 1 for ready in several) + 1,
        block_size=several[0].block_size,
        info=info,
    )


class CombinedProgress:
    """The start of several cores as one: the phase of the slowest, with what all of them have done of it."""

    def __init__(self, num_cores: int) -> None:
        # Of each core: the phases it has come to, in order, with done and total.
        self._phases: list[dict[str, StartupProgress]] = [{} for _ in range(num_cores)]

    def add(self, core: int, news: StartupProgress) -> StartupProgress | None:
        """Take one core's news. Returns what all have done together, None while one has said nothing yet."""
        own = self._phases[core]
        if own and news.phase not in own:  # what it left behind is done
            before = own[list(own)[-1]]
            before.done = before.total
        own[news.phase] = StartupProgress(news.phase, news.done, news.total)
        slowest = min(self._phases, key=len)
        if not slowest:
            return None
        phase = list(slowest)[-1]
        known = [phases[phase] for phases in self._phases if phase in phases]
        return StartupProgress(phase, sum(part.done for part in known), sum(part.total for part in known))
