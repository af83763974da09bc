"""The named rows of `shoal bench`: a model's shape and a workload, written as a config.json that needs no download.

The weights are then random (load_format dummy), so a row measures speed and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from shoal.benchmark.workload import Workload

_LLAMA_3_ROPE = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_MIN_VOCAB_SIZE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's sizes, in elements, as its published config.json has them. more: its keys that not every family has."""

    name: str
    architecture: str
    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    max_position_embeddings: int
    norm_eps: float
    rope: dict[str, Any]
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def scaled(self, scale: float) -> Shape:
        """About `scale` (above 0, at most 1) times as many layers, heads, hidden sizes and words.

        Heads keep their size and their number per KV head, so that the kernels are those of the whole shape.
        """
        num_kv_heads = max(1, round(self.num_kv_heads * scale))
        return dataclasses.replace(
            self,
            num_layers=max(1, round(self.num_layers * scale)),
            hidden_size=_multiple(self.hidden_size * scale, self.head_dim),
            intermediate_size=_multiple(self.intermediate_size * scale, self.head_dim),
            num_heads=num_kv_heads * (self.num_heads // self.num_kv_heads),
            num_kv_heads=num_kv_heads,
            vocab_size=max(_MIN_VOCAB_SIZE, _multiple(self.vocab_size * scale, 64)),
        )

    def config(self) -> dict[str, Any]:
        """What config.json says."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "silu",
            "rope_parameters": self.rope,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "dtype": "bfloat16",
            **self.more,
        }

    def write(self, directory: Path) -> None:
        """Write `directory`/config.json."""
        (directory / "config.json").write_text(json.dumps(self.config(), indent=2), encoding="utf-8")


def _multiple(size: float, unit: int) -> int:
    """The multiple of `unit` nearest to `size`, at least one."""
    return max(1, round(size / unit)) * unit


QWEN3_600M = Shape(
    name="Qwen3-0.6B",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    num_layers=28,
    hidden_size=1024,
    intermediate_size=3072,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    tied=True,
    max_position_embeddings=40960,
    norm_eps=1e-6,
    rope={"rope_theta": 1000000.0, "rope_type": "default"},
)
LLAMA_8B = Shape(
    name="Llama-3.1-8B",
    architecture="LlamaForCausalLM",
    model_type="llama",
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    tied=False,
    max_position_embeddings=131072,
    norm_eps=1e-5,
    rope=_LLAMA_3_ROPE,
)
LLAMA_70B = dataclasses.replace(
    LLAMA_8B, name="Llama-3.1-70B", num_layers=80, hidden_size=8192, intermediate_size=28672, num_heads=64
)
QWEN3_30B_A3B = Shape(
    name="Qwen3-30B-A3B",
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    num_layers=48,
    hidden_size=2048,
    intermediate_size=6144,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    vocab_size=151936,
    tied=False,
    max_position_embeddings=40960,
    norm_eps=1e-6,
    rope={"rope_theta": 1000000.0, "rope_type": "default"},
    more={"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
)
QWEN25_32B_GPTQ = Shape(
    name="Qwen2.5-32B-GPTQ-Int4",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    num_layers=64,
    hidden_size=5120,
    intermediate_size=27648,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=152064,
    tied=False,
    max_position_embeddings=32768,
    norm_eps=1e-6,
    rope={"rope_theta": 1000000.0, "rope_type": "default"},
    more={
        "quantization_config": {
            "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
        }
    },
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Preset:
    """One row: a shape, what is asked of it, the ranks it is meant for, and whether it is measured deterministic."""

    shape: Shape
    workload: Workload
    tensor_parallel_size: int = 1
    deterministic: bool = False

    def scaled(self, scale: float) -> Preset:
        """A smaller model and fewer requests; the lengths stay."""
        num_requests = max(1, round(self.workload.num_requests * scale))
        workload = dataclasses.replace(self.workload, num_requests=num_requests)
        return dataclasses.replace(self, shape=self.shape.scaled(scale), workload=workload)


_LAT8B = Preset(LLAMA_8B, Workload(1, (128, 128), (256, 256)))
_BATCH8B = Preset(LLAMA_8B, Workload(256, (100, 1024), (100, 512)))
_PREFILL8B = Preset(LLAMA_8B, Workload(32, (4096, 4096), (1, 1)))

LATENCY_PRESETS = {
    "small1": Preset(QWEN3_600M, Workload(1, (128, 128), (512, 512))),
    "lat8b": _LAT8B,
    "lat8b-tp2": dataclasses.replace(_LAT8B, tensor_parallel_size=2),
    "det-lat8b": dataclasses.replace(_LAT8B, deterministic=True),
    "lat30b-moe": Preset(QWEN3_30B_A3B, Workload(1, (128, 128), (256, 256))),
    "gptq1": Preset(QWEN25_32B_GPTQ, Workload(1, (128, 128), (128, 128))),
    "lat70b": Preset(LLAMA_70B, Workload(1, (128, 128), (128, 128)), tensor_parallel_size=4),
}
THROUGHPUT_PRESETS = {
    "nano": Preset(QWEN3_600M, Workload(256, (100, 1024), (100, 1024), temperature=1.0)),
    "batch8b": _BATCH8B,
    "batch8b-tp2": dataclasses.replace(_BATCH8B, tensor_parallel_size=2),
    "det-batch8b": dataclasses.replace(_BATCH8B, deterministic=True),
    "prefill8b": _PREFILL8B,
    "det-prefill8b": dataclasses.replace(_PREFILL8B, deterministic=True),
    "batch30b-moe": Preset(QWEN3_30B_A3B, Workload(256, (100, 1024), (100, 512))),
    "gptq64": Preset(QWEN25_32B_GPTQ, Workload(64, (128, 512), (256, 256))),
    "batch70b": Preset(LLAMA_70B, Workload(128, (100, 1024), (100, 256)), tensor_parallel_size=4),
}
PRESETS = {**LATENCY_PRESETS, **THROUGHPUT_PRESETS}
