"""Bytes: a model's weights by component, one rank's part of them, its KV cache, activations and CUDA graphs.

Weights and cache are exact. Activations, graphs and what CUDA and NCCL take are estimates; docs/plan.md has them all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

from shoal.cluster.plan.devices import Device
from shoal.cluster.plan.shape import Layer, Matrix, ModelShape, Part
from shoal.config.cache_dtypes import ROUNDED
from shoal.config.graph_sizes import graph_bytes, large_sum_bytes

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What a process on a GPU takes besides: CUDA's context and kernels; NCCL's buffers where there are several ranks.
CUDA_CONTEXT_BYTES = 600 << 20
NCCL_BYTES = 400 << 20
# Of a host without a GPU: the system, and an engine's processes besides their weights.
HOST_RESERVED_BYTES = 2 << 30
_SAMPLING_BYTES = 24  # a logit: its copies in the model's dtype and fp32, and what sorting them takes
# The engine's default cache on a CPU: twice the weights, within these, and at most half of what is free.
_CPU_CACHE_LEAST, _CPU_CACHE_MOST = 512 << 20, 4 << 30
COMPONENTS = (
    "embedding", "attention", "mlp", "experts", "shared_experts", "router", "norms", "head", "scales", "zeros", "g_idx",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of the machine, and the options of the engine that cost memory.

    dtype, kv_dtype: names. num_seqs, num_batched_tokens: as `shoal serve` would have them.
    """

    max_model_len: int
    concurrency: int
    dtype: str
    kv_dtype: str
    utilization: float
    num_seqs: int
    num_batched_tokens: int
    block_size: int = 16

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.dtype]

    @property
    def kv_itemsize(self) -> int:
        return 1 if self.kv_dtype in ROUNDED else ITEMSIZES[self.kv_dtype]

    @property
    def context(self) -> int:
        """Tokens of a request halfway: what predictions of decoding count with."""
        return max(1, self.max_model_len // 2)

    @property
    def prompt(self) -> int:
        """Tokens of the prompt whose first token is timed."""
        return min(1024, self.context)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """How one replica is cut. expert_size: ranks that share experts whole; 0: experts are cut like other matrices."""

    tensor_size: int = 1
    partition: tuple[int, ...] = ()
    expert_size: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of the fullest rank. budget: what the engine may use; left: of it, without the cache of the load."""

    budget: int
    weights: int
    activations: int
    graphs: int
    overhead: int

    @property
    def cache(self) -> int:
        """What is left for the KV cache; below 0 where weights alone do not fit."""
        return self.budget - self.weights - self.activations - self.graphs - self.overhead


def part_bytes(part: Part, itemsize: int, tensor_size: int = 1, expert_size: int = 0) -> dict[str, int]:
    """By component; scales, zeros and g_idx of quantized matrices are components of their own."""
    if not isinstance(part, Matrix):
        return {part.component: part.size * (part.itemsize or itemsize)}
    count, out_features, in_features = part.local(tensor_size, expert_size)
    sizes = part.format.sizes(out_features, in_features, itemsize, is_fused=part.is_fused)
    found = {part.component: count * (sizes.values + (out_features * itemsize if part.bias else 0))}
    for name, size in (("scales", sizes.scales), ("zeros", sizes.zeros), ("g_idx", sizes.g_idx)):
        if size:
            found[name] = count * size
    return found


def component_bytes(parts: Iterable[Part], itemsize: int) -> dict[str, int]:
    """The checkpoint's bytes by component, whole, in the order of COMPONENTS; absent ones are left out."""
    total: dict[str, int] = {}
    for part in parts:
        for name, size in part_bytes(part, itemsize).items():
            total[name] = total.get(name, 0) + size
    order = {name: place for place, name in enumerate(COMPONENTS)}
    return dict(sorted(total.items(), key=lambda pair: order.get(pair[0], len(order))))


def sum_bytes(parts: Iterable[Part], itemsize: int, tensor_size: int = 1, expert_size: int = 0) -> int:
    return sum(sum(part_bytes(part, itemsize, tensor_size, expert_size).values()) for part in parts)


@functools.lru_cache(maxsize=4096)
def layer_bytes(layer: Layer, itemsize: int, tensor_size: int, expert_size: int) -> int:
    """Of one rank."""
    return sum_bytes(layer.parts, itemsize, tensor_size, expert_size)


def stage_parts(shape: ModelShape, stage: int, num_stages: int) -> list[Part]:
    """What a stage has beside its layers. A tied head is a copy of its own on the last of several stages."""
    parts: list[Part] = [*shape.first] if stage == 0 else []
    if stage == num_stages - 1:
        parts += shape.last
        if shape.is_tied and num_stages > 1:
            parts.append(shape.head)
    return parts


def stage_layers(shape: ModelShape, cut: Cut, stage: int) -> tuple[Layer, ...]:
    start = sum(cut.partition[:stage])
    return shape.layers[start : start + cut.partition[stage]]


def stage_weight_bytes(shape: ModelShape, cut: Cut, stage: int, itemsize: int) -> int:
    """Weights of one rank of a stage."""
    parts = stage_parts(shape, stage, len(cut.partition))
    total = sum_bytes(parts, itemsize, cut.tensor_size, cut.expert_size)
    for layer in stage_layers(shape, cut, stage):
        total += layer_bytes(layer, itemsize, cut.tensor_size, cut.expert_size)
    return total


# --- the KV cache ------------------------------------------------------------------------------------------------


def token_cache_bytes(layers: Iterable[Layer], kv_itemsize: int, tensor_size: int = 1) -> int:
    """Bytes that one token takes in the caches of these layers on one rank. The engine keeps a token for as long as
    its request runs, also where a layer's window has passed it."""
    return sum(layer.cache.elements(tensor_size) for layer in layers) * kv_itemsize


def seen_cache_bytes(layers: Iterable[Layer], kv_itemsize: int, context: int, tensor_size: int = 1) -> int:
    """Bytes of a sequence's cache that a step reads: windows counted."""
    return sum(layer.cache.elements(tensor_size) * layer.cache.seen(context) for layer in layers) * kv_itemsize


def request_tokens(load: Load) -> int:
    """Places in the cache of one request at its longest: whole blocks."""
    return -(-load.max_model_len // load.block_size) * load.block_size


# --- what a step takes -------------------------------------------------------------------------------------------


def rank_memory(shape: ModelShape, cut: Cut, stage: int, device: Device, load: Load, num_ranks: int) -> RankMemory:
    """One rank of a stage. num_ranks: of the engine."""
    weights = stage_weight_bytes(shape, cut, stage, load.itemsize)
    is_last = stage == len(cut.partition) - 1
    activations = activation_bytes(shape, cut, load, is_last=is_last)
    if device.is_cpu:
        available = device.memory_bytes - HOST_RESERVED_BYTES
        free = available - weights - activations
        cache = min(max(2 * weights, _CPU_CACHE_LEAST), _CPU_CACHE_MOST, (available - weights) // 2)
        # Below the weights' own size nothing is clipped: the shortfall is what shall be seen.
        budget = weights + activations + (min(cache, free) if free > 0 else free)
        return RankMemory(budget=budget, weights=weights, activations=activations, graphs=0, overhead=0)
    sums = large_sum_bytes(shape.config, cut.tensor_size, load.num_batched_tokens, load.itemsize)
    return RankMemory(
        budget=int(device.memory_bytes * load.utilization),
        weights=weights,
        activations=activations,
        graphs=graph_bytes(shape.config, cut.tensor_size, load.num_seqs, load.num_batched_tokens),
        overhead=CUDA_CONTEXT_BYTES + (NCCL_BYTES if num_ranks > 1 else 0) + sums,
    )


def activation_bytes(shape: ModelShape, cut: Cut, load: Load, *, is_last: bool) -> int:
    """The peak of a step of `num_batched_tokens`: within an MLP or among experts; or when tokens are chosen."""
    config, tokens = shape.config, load.num_batched_tokens
    size = config.hidden_size
    # Hidden states and residual; gate and up beside their product, at the widest MLP.
    width = max((*shape.mlp_widths, 0)) / cut.tensor_size
    within = 2 * size + 3 * width
    if shape.num_experts:
        cut_by = 1 if cut.expert_size else cut.tensor_size
        share = 1 / cut.expert_size if cut.expert_size else 1.0
        routed = shape.experts_per_token * share * (2 * size + 3 * shape.expert_width / cut_by)
        within = max(within, 3 * size + routed)
    heads = (config.num_heads + 2 * max(1, config.num_kv_heads // cut.tensor_size)) * config.head_dim
    within = max(within, 3 * size + 2 * heads / cut.tensor_size)
    peak = tokens * within * load.itemsize
    if is_last:
        logits = min(load.num_seqs, tokens) * config.vocab_size / cut.tensor_size * _SAMPLING_BYTES
        peak = max(peak, tokens * size * load.itemsize + logits)
    return int(peak)
