"""EngineConfig: what the engine runs with, resolved once from the options and the model's files, then frozen."""

from __future__ import annotations

import dataclasses

from shoal.config.model_config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Resolved settings of one engine. `device` and what depends on memory are settled where torch is: in the worker.

    dtype: "float32", "bfloat16" or "float16". kv_cache_memory: bytes or None (from what is free).
    max_num_seqs, max_num_batched_tokens: None until the device is known (then `with_device_defaults`).
    """

    model: ModelConfig
    device: str
    dtype: str
    load_format: str
    seed: int
    deterministic: bool
    enforce_eager: bool
    max_model_len: int
    block_size: int
    gpu_memory_utilization: float
    kv_cache_memory: int | None
    num_blocks_override: int | None
    enable_prefix_caching: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool
    long_prefill_token_threshold: int
    scheduling_policy: str
    async_scheduling: bool
    generation: int = 0
