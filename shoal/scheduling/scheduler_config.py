"""What the scheduler is told once, and what it counts. The engine core makes the one and reports the other."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step and of the cache. num_blocks counts the null block.

    num_stages: of the pipeline; as many steps are in flight, and with async_scheduling one more, which is made before
    the tokens of those ahead of it are known.
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    by_priority: bool = False
    num_stages: int = 1
    async_scheduling: bool = True
    generation: int = 0


@dataclasses.dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start."""

    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
