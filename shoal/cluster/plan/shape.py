"""What a model is made of, in elements: its matrices and vectors by component, layer by layer, and its KV cache.

`families` makes it from a config.json, `memory` counts its bytes, `cost` its reads and multiplications.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Iterable

from shoal.cluster.plan.formats import Format
from shoal.config.model_config import ModelConfig

# Shoal's slices of the vocabulary begin at whole tiles of this many rows (`distributed.vocabulary`).
VOCABULARY_MULTIPLE = 64


class Split(enum.Enum):
    """How tensor-parallel ranks share a matrix."""

    WHOLE = "whole"  # each has all of it
    OUT = "out"  # each computes a part of the outputs
    IN = "in"  # each has a part of the inputs; products are summed
    KV = "kv"  # outputs by KV heads, which several ranks copy when they are more
    VOCABULARY = "vocabulary"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matrix:
    """A linear layer, or an embedding's table. name: its module, without the layer's prefix.

    heads: KV heads, where the split is KV. count: how many there are of it (experts). is_fused: the checkpoint holds it
    in one module with the matrix before it. can_quantize: whether quantized checkpoints quantize it.
    """

    component: str
    name: str
    out_features: int
    in_features: int
    split: Split = Split.WHOLE
    heads: int = 0
    count: int = 1
    bias: bool = False
    is_fused: bool = False
    is_expert: bool = False
    can_quantize: bool = True
    format: Format = dataclasses.field(default_factory=Format)

    @property
    def num_parameters(self) -> int:
        return self.count * self.out_features * (self.in_features + self.bias)

    def local(self, tensor_size: int, expert_size: int = 0) -> tuple[int, int, int]:
        """(count, outputs, inputs) of one rank. expert_size: ranks that share the experts whole; 0: they are cut."""
        if tensor_size == 1 and not expert_size:
            return self.count, self.out_features, self.in_features
        if self.is_expert and expert_size:
            return -(-self.count // expert_size), self.out_features, self.in_features
        out_features, in_features = self.out_features, self.in_features
        if self.split is Split.OUT:
            out_features = -(-out_features // tensor_size)
        elif self.split is Split.IN:
            in_features = -(-in_features // tensor_size)
        elif self.split is Split.KV:
            out_features = max(1, self.heads // tensor_size) * (out_features // self.heads)
        elif self.split is Split.VOCABULARY and tensor_size > 1:
            width = tensor_size * VOCABULARY_MULTIPLE
            out_features = -(-out_features // width) * VOCABULARY_MULTIPLE
        return self.count, out_features, in_features


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vector:
    """Weights of a norm, or other numbers that every rank has whole. itemsize: None: the model's dtype."""

    component: str
    name: str
    size: int
    itemsize: int | None = None

    @property
    def num_parameters(self) -> int:
        return self.size


Part = Matrix | Vector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """A layer's KV cache. num_heads × width elements a token; latent (MLA): every tensor-parallel rank has it whole.

    window: tokens that are seen; None: all. num_query_heads × query_width: multiplications (and additions) of one query
    with one token of its context.
    """

    num_heads: int
    width: int
    window: int | None
    num_query_heads: int
    query_width: int
    is_latent: bool = False

    def elements(self, tensor_size: int = 1) -> int:
        """Of one token on one rank."""
        heads = self.num_heads if self.is_latent else max(1, self.num_heads // tensor_size)
        return heads * self.width

    def seen(self, context: int) -> int:
        return context if self.window is None else min(context, self.window)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    parts: tuple[Part, ...]
    cache: Cache

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.parts, self.cache))

    def __hash__(self) -> int:
        # Asked for thousands of times: sums over layers are kept by layer.
        return self._hash

    @property
    def has_experts(self) -> bool:
        return any(isinstance(part, Matrix) and part.is_expert for part in self.parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A whole model. config: as Shoal's own checks of degrees take it.

    first: before the layers, on the first pipeline stage. last: after them, on the last; the head among them, unless it
    is tied to the embedding. head: the product that gives logits. apart: in the checkpoint, not loaded.
    """

    config: ModelConfig
    first: tuple[Part, ...]
    layers: tuple[Layer, ...]
    last: tuple[Part, ...]
    head: Matrix
    apart: tuple[Part, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    expert_width: int = 0

    @property
    def is_tied(self) -> bool:
        return self.head not in self.last

    @functools.cached_property
    def distinct_layers(self) -> tuple[Layer, ...]:
        return tuple(dict.fromkeys(self.layers))

    @functools.cached_property
    def mlp_widths(self) -> tuple[int, ...]:
        """Of MLPs and shared experts, which tensor-parallel ranks always cut."""
        return tuple(
            dict.fromkeys(
                part.out_features
                for layer in self.distinct_layers
                for part in layer.parts
                if isinstance(part, Matrix) and part.component in ("mlp", "shared_experts") and part.split is Split.OUT
            )
        )

    @functools.cached_property
    def partitions(self) -> dict[int, tuple[int, ...]]:
        """Layers of each stage by the number of stages, as far as they were computed (`placement.partition`)."""
        return {}

    def parts(self) -> list[Part]:
        """All that is loaded, each once."""
        return [*self.first, *(part for layer in self.layers for part in layer.parts), *self.last]

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters for part in self.parts())

    @property
    def num_active_parameters(self) -> int:
        """That a token passes; the embedding's table is looked up, not multiplied with, but counted as is customary."""
        total = 0.0
        for part in self.parts():
            share = 1.0
            if isinstance(part, Matrix) and part.is_expert:
                share = self.experts_per_token / self.num_experts
            total += part.num_parameters * share
        return math.floor(total)


def same_objects(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Equal layers as one object, which compares at once."""
    known: dict[Layer, Layer] = {}
    return tuple(known.setdefault(layer, layer) for layer in layers)
