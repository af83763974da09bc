"""EngineConfig: what the engine runs with, resolved once from the options and the model's files, then frozen."""

from __future__ import annotations

import dataclasses

import msgspec

from shoal.config.lora import LoraConfig
from shoal.config.model_config import ModelConfig
from shoal.config.parallel import ParallelConfig
from shoal.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Resolved settings of one engine; `config.resolve` makes it, and the engine core's process gets it as JSON.

    device: "cpu" or "cuda". dtype: "float32", "bfloat16" or "float16".
    kv_cache_memory: bytes, or None: from what is free, which the worker finds out.
    num_blocks_override: number of KV cache blocks whatever the memory says. generation: of the engine, see messages.
    kv_cache_dtype: a name of `cache_dtypes.CACHE_DTYPES`.
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
    lora: LoraConfig | None = None
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    generation: int = 0
    kv_cache_dtype: str = "auto"

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes | str) -> EngineConfig:
        """Raises ConfigError for anything that `to_json` of this version did not write."""
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise ConfigError(f"this is no EngineConfig of this version of Shoal: {error}") from error
