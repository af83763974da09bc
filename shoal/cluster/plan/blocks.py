"""What layers are made of: attention, MLPs, norms, and the reader of a config.json. `families` and `experts` build
layers of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from shoal.cluster.plan.shape import Cache, Matrix, Part, Split, Vector
from shoal.config.model_config import ModelConfig
from shoal.errors import ModelError

_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Reader:
    """A config.json, read for what its layers are made of. Raises ModelError for what is missing or wrong."""

    raw: dict[str, Any]
    architecture: str
    path: str

    def size(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{name} must be a positive integer; found {self.raw.get(name)!r}")
        return value

    def count(self, name: str, default: int = 0) -> int:
        """As `size`, and 0 or null are allowed."""
        return 0 if not self.raw.get(name, default) else self.size(name, default)

    def dtype(self) -> str:
        name = str(self.raw.get("dtype") or self.raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        if name not in _DTYPES:
            raise ModelError(f"dtype {name!r} is not known; known: {', '.join(_DTYPES)}")
        return name

    def windows(self, default: int, pattern: int) -> list[int | None]:
        """A window a layer: by layer_types, else in all but each `pattern`-th layer."""
        window, num_layers = self.size("sliding_window", default), self.size("num_hidden_layers")
        kinds = self.raw.get("layer_types")
        if kinds is None:
            return [window if (index + 1) % pattern else None for index in range(num_layers)]
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise ModelError(f"layer_types must name {num_layers} layers; found {kinds!r}")
        return [window if kind == "sliding_attention" else None for kind in kinds]

    def config(
        self,
        *,
        head_dim: int | None = None,
        intermediate: str | int = "intermediate_size",
        num_kv_heads: int | None = None,
        tied: bool = False,
        norm: str = "rms_norm_eps",
        windows: Sequence[int | None] | None = None,
    ) -> ModelConfig:
        """A ModelConfig of these sizes, for Shoal's own checks of degrees and its balance of stages.

        tied: what an absent tie_word_embeddings means.
        """
        hidden_size, num_heads = self.size("hidden_size"), self.size("num_attention_heads")
        num_layers = self.size("num_hidden_layers")
        if head_dim is None and self.raw.get("head_dim") is None and hidden_size % num_heads:
            raise ModelError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
        kv_heads = num_kv_heads or self.size("num_key_value_heads", num_heads)
        if num_heads % kv_heads:
            raise ModelError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {kv_heads}")
        return ModelConfig(
            path=self.path,
            architecture=self.architecture,
            model_type=str(self.raw.get("model_type", "")),
            vocab_size=self.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=intermediate if isinstance(intermediate, int) else self.size(intermediate),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim or self.size("head_dim", hidden_size // num_heads),
            max_position_embeddings=self.size("max_position_embeddings", 8192),
            norm_eps=float(self.raw.get(norm, 1e-6)),
            hidden_act=str(self.raw.get("hidden_act", "silu")),
            tie_word_embeddings=bool(self.raw.get("tie_word_embeddings", tied)),
            attention_bias=bool(self.raw.get("attention_bias", False)),
            rope=None,
            sliding_windows=tuple(windows or (None,) * num_layers),
            dtype=self.dtype(),
            bos_token_id=None,
            eos_token_ids=(),
            generation_defaults={},
            raw=self.raw,
        )


def matrix(
    component: str,
    name: str,
    out_features: int,
    in_features: int,
    split: Split = Split.WHOLE,
    *,
    bias: bool = False,
) -> Matrix:
    """One outside of the layers: no checkpoint quantizes it, unless it says so of the head."""
    return Matrix(
        component=component,
        name=name,
        out_features=out_features,
        in_features=in_features,
        split=split,
        bias=bias,
        can_quantize=False,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Query, key, value and output projections of grouped-query attention. head_norms: RMSNorm of each head."""

    qkv_bias: bool = False
    output_bias: bool = False
    head_norms: bool = False
    output_name: str = "o_proj"
    is_fused: bool = False

    def parts(self, config: ModelConfig) -> list[Part]:
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        made: list[Part] = []
        for index, (name, out, split) in enumerate(
            (("q_proj", width, Split.OUT), ("k_proj", kv_width, Split.KV), ("v_proj", kv_width, Split.KV))
        ):
            made.append(
                Matrix(
                    component="attention",
                    name=f"self_attn.{'qkv_proj' if self.is_fused else name}",
                    out_features=out,
                    in_features=config.hidden_size,
                    split=split,
                    heads=config.num_kv_heads if split is Split.KV else 0,
                    bias=self.qkv_bias,
                    is_fused=self.is_fused and index > 0,
                )
            )
        made.append(
            Matrix(
                component="attention",
                name=f"self_attn.{self.output_name}",
                out_features=config.hidden_size,
                in_features=width,
                split=Split.IN,
                bias=self.output_bias,
            )
        )
        if self.head_norms:
            made += [Vector(component="norms", name=f"self_attn.{name}_norm", size=config.head_dim) for name in "qk"]
        return made


def cache_of(config: ModelConfig, window: int | None) -> Cache:
    """Keys and values of grouped-query attention."""
    return Cache(
        num_heads=config.num_kv_heads,
        width=2 * config.head_dim,
        window=window,
        num_query_heads=config.num_heads,
        query_width=2 * config.head_dim,
    )


def gated_mlp(
    hidden_size: int,
    width: int,
    *,
    bias: bool = False,
    is_fused: bool = False,
    component: str = "mlp",
    prefix: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    count: int = 1,
    is_expert: bool = False,
) -> list[Matrix]:
    """Gate, up and down. count: of experts."""
    gate, up, down = names
    made: list[Matrix] = []
    for name, out, inputs, split in (
        ("gate_up_proj" if is_fused else gate, width, hidden_size, Split.OUT),
        ("gate_up_proj" if is_fused else up, width, hidden_size, Split.OUT),
        (down, hidden_size, width, Split.IN),
    ):
        made.append(
            Matrix(
                component=component,
                name=f"{prefix}.{name}",
                out_features=out,
                in_features=inputs,
                split=split,
                bias=bias,
                is_fused=is_fused and len(made) == 1,
                count=count,
                is_expert=is_expert,
            )
        )
    return made


def plain_mlp(hidden_size: int, width: int, *, bias: bool) -> list[Matrix]:
    """fc1, fc2."""
    return [
        Matrix(component="mlp", name="fc1", out_features=width, in_features=hidden_size, split=Split.OUT, bias=bias),
        Matrix(component="mlp", name="fc2", out_features=hidden_size, in_features=width, split=Split.IN, bias=bias),
    ]


def norms(config: ModelConfig, *names: str) -> list[Vector]:
    """RMSNorms over the hidden size."""
    return [Vector(component="norms", name=name, size=config.hidden_size) for name in names]
