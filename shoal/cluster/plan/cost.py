"""What a layout takes: seconds of a step from bytes read, multiplications and messages, as docs/plan.md explains.

The constants were fitted to benchmarks/gpu_results.md (H100, 2026-11): lat8b, small1, lat8b-tp2, batch8b, prefill8b.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from shoal.cluster.plan.devices import Device
from shoal.cluster.plan.links import Link, Links
from shoal.cluster.plan.memory import Load, part_bytes, stage_layers
from shoal.cluster.plan.placement import Layout
from shoal.cluster.plan.shape import Layer, Matrix, ModelShape
from shoal.config.graph_sizes import OVERLAP_TOKENS, tokens_in_halves

# Shares of the vendor's figure that are reached: by copies and products of few rows; by decode attention (88 % of
# that); by products of many rows; by attention over prompts.
BANDWIDTH_SHARE, ATTENTION_BANDWIDTH_SHARE = 0.90, 0.79
RATE_SHARE, ATTENTION_RATE_SHARE = 0.66, 0.33
# Weight-only int4 is unpacked on the way. Not measured: Shoal had no such kernel when this was written.
UNPACK_SHARE = 0.75
# Seconds that no byte and no multiplication explains: of a layer (starts of its kernels, norms), of its experts
# (router, sorting), of a step (choosing tokens), of a request's way to its first token.
LAYER_SECONDS, EXPERT_SECONDS, STEP_SECONDS, REQUEST_SECONDS = 15e-6, 15e-6, 20e-6, 3.2e-3
CPU_LAYER_SECONDS, CPU_REQUEST_SECONDS = 250e-6, 5e-3
# Of sums that are hidden behind the other half's products what is left to see (70B on four GPUs with NVLink: 40 %).
_SEEN_SHARE = 0.5
# fp32 has no matrix units of its own on a GPU.
_FP32_SHARE = 1 / 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds a token (decode), tokens a second (rates).

    decode_limit: what a token alone takes by the bytes of its weights and nothing else. running: requests at a time
    that the other figures at the load are of; fewer than asked for where the cache holds no more.
    """

    decode_alone: float
    decode_limit: float
    running: int
    decode_loaded: float
    output_rate: float
    first_token: float
    prefill_rate: float


@dataclasses.dataclass(frozen=True)
class _Work:
    """Of one layer on one rank: bytes of weights and multiplications (times two) of a row; of one expert by itself."""

    dense_bytes: float
    dense_flops: float
    expert_bytes: float
    expert_flops: float
    num_experts: int


@dataclasses.dataclass(frozen=True)
class _Speeds:
    """Of a device for a model's dtype: bytes/s and FLOP/s that are reached, seconds of a layer."""

    bandwidth: float
    attention_bandwidth: float
    rate: float
    attention_rate: float
    layer: float
    expert: float
    step: float
    request: float


@functools.lru_cache(maxsize=8192)
def _work(
    layer: Layer, itemsize: int, tensor_size: int, expert_size: int, fp8_gain: float, unpack_share: float
) -> _Work:
    """fp8_gain: how many times as fast as the model's dtype the device multiplies in fp8."""
    sums = [0.0, 0.0, 0.0, 0.0]
    num_experts = 0
    for part in layer.parts:
        read = float(sum(part_bytes(part, itemsize, tensor_size, expert_size).values()))
        if not isinstance(part, Matrix):
            sums[0] += read
            continue
        if part.format.bits < 8:
            read /= unpack_share
        count, out_features, in_features = part.local(tensor_size, expert_size)
        flops = 2.0 * out_features * in_features / (fp8_gain if part.format.computes_in_fp8 else 1.0)
        place = 2 if part.is_expert else 0
        sums[place] += read / count
        sums[place + 1] += flops
        if part.is_expert:
            num_experts = part.count
    return _Work(sums[0], sums[1], sums[2], sums[3], num_experts)


class CostModel:
    """Predicts layouts of one model on one kind of device."""

    def __init__(self, shape: ModelShape, device: Device, links: Links, load: Load) -> None:
        self._shape, self._device, self._links, self._load = shape, device, links, load
        self._speeds = _speeds(device, load.dtype)
        rate = self._speeds.rate / (1.0 if device.is_cpu else RATE_SHARE)
        self._fp8_gain = max(1.0, device.fp8_rate / rate) if device.fp8_rate else 1.0

    def predict(self, layout: Layout, capacity: int, context: int | None = None) -> Prediction:
        """capacity: requests of full length that all replicas hold together. context: tokens that a decode sees."""
        load = self._load
        context = load.context if context is None else context
        running = max(1, min(load.concurrency, capacity))
        rows = -(-running // layout.data_size)
        num_batches = min(layout.pipeline_size, rows)
        loaded = self._round(layout, -(-rows // num_batches), context, num_batches)
        prefill, first_token = self._prefill(layout)
        return Prediction(
            decode_alone=self._round(layout, 1, context, 1),
            decode_limit=self.weight_seconds(layout),
            running=running,
            decode_loaded=loaded,
            output_rate=running / loaded,
            first_token=first_token,
            prefill_rate=prefill,
        )

    def weight_seconds(self, layout: Layout) -> float:
        """Seconds to read the weights that one token passes, over all stages, as if nothing else took time."""
        packed = sum(
            count * self._read(self._work(layer, layout, unpacks=False), layout, 1)[0]
            for layer, count in _counted(self._shape.layers)
        )
        return (packed + self._head_bytes(layout)) / self._speeds.bandwidth

    # --- decoding --------------------------------------------------------------------------------------------------

    def _round(self, layout: Layout, rows: int, context: int, num_batches: int) -> float:
        """Seconds until each of `num_batches` batches of `rows` requests has its next token."""
        stages = [self._stage(layout, stage, rows, context, is_prompt=False) for stage in range(layout.pipeline_size)]
        sends = [self._send(layout, boundary, rows) for boundary in range(layout.pipeline_size - 1)]
        back = self._link(any(layout.crossings)).send(4 * rows) if layout.pipeline_size > 1 else 0.0
        return max(sum(stages) + sum(sends) + back, num_batches * max(stages))

    def _stage(self, layout: Layout, stage: int, tokens: int, context: int, *, is_prompt: bool) -> float:
        """Seconds of one step on one stage: decodes of `tokens` requests with `context` tokens each, or as many tokens
        of a prompt that see `context` on average."""
        speeds, layers = self._speeds, stage_layers(self._shape, layout.cut, stage)
        computing, talking = 0.0, 0.0
        for layer, count in _counted(layers):
            work = self._work(layer, layout)
            read, flops = self._read(work, layout, tokens)
            seconds = math.hypot(read / speeds.bandwidth, flops / speeds.rate)
            seconds += self._attention(layer, layout, tokens, context, is_prompt) + speeds.layer
            computing += count * (seconds + (speeds.expert if work.num_experts else 0.0))
            talking += count * self._talk(layer, layout, tokens)
        extra = speeds.step
        if stage == 0:
            extra += self._sum(layout, tokens)
        if stage == layout.pipeline_size - 1:
            rows = 1 if is_prompt else tokens
            read = self._head_bytes(layout)
            extra += math.hypot(read / speeds.bandwidth, rows * read / self._load.itemsize * 2 / speeds.rate)
            extra += self._sum(layout, 1)
        if is_prompt and self._hides_sums(layout, tokens):
            return max(computing, talking) + _SEEN_SHARE * min(computing, talking) + extra
        return computing + talking + extra

    def _work(self, layer: Layer, layout: Layout, *, unpacks: bool = True) -> _Work:
        share = UNPACK_SHARE if unpacks else 1.0
        return _work(layer, self._load.itemsize, layout.tensor_size, layout.expert_size, self._fp8_gain, share)

    def _read(self, work: _Work, layout: Layout, tokens: int) -> tuple[float, float]:
        """Bytes of weights that a step reads in a layer, and its multiplications, on the fullest rank.

        Tokens choose among E experts k each: they touch E (1 − (1 − k/E)^tokens). Where ranks share the experts whole,
        the fullest has more than its part: of m on average about m + √(2 m ln ranks).
        """
        if not work.num_experts:
            return work.dense_bytes, tokens * work.dense_flops
        per_token = self._shape.experts_per_token
        all_tokens = tokens * (layout.data_size if layout.in_lockstep else 1)
        touched = work.num_experts * (1 - (1 - per_token / work.num_experts) ** all_tokens)
        chosen = float(all_tokens * per_token)
        if ranks := layout.expert_size:
            mean = touched / ranks
            fullest = min(mean + math.sqrt(2 * mean * math.log(ranks)), work.num_experts / ranks, touched)
            touched, chosen = fullest, chosen / ranks * max(1.0, fullest / mean)
        return (
            work.dense_bytes + touched * work.expert_bytes,
            tokens * work.dense_flops + chosen * work.expert_flops,
        )

    def _attention(self, layer: Layer, layout: Layout, tokens: int, context: int, is_prompt: bool) -> float:
        cache, speeds = layer.cache, self._speeds
        seen = cache.seen(context)
        num_bytes = seen * cache.elements(layout.tensor_size) * self._load.kv_itemsize * (1 if is_prompt else tokens)
        heads = cache.num_query_heads / layout.tensor_size
        flops = 2.0 * tokens * seen * heads * cache.query_width
        return math.hypot(num_bytes / speeds.attention_bandwidth, flops / speeds.attention_rate)

    def _head_bytes(self, layout: Layout) -> float:
        head = self._shape.head
        return float(sum(part_bytes(head, self._load.itemsize, layout.tensor_size).values()))

    # --- messages --------------------------------------------------------------------------------------------------

    def _link(self, crosses: bool) -> Link:
        return self._links.between if crosses else self._links.inside

    def _hides_sums(self, layout: Layout, tokens: int) -> bool:
        fewest = OVERLAP_TOKENS
        if layout.tensor_nodes == 1 and self._links.inside.name == "NVLink":
            fewest = tokens_in_halves(self._shape.config, layout.tensor_size, self._load.itemsize)
        return tokens >= fewest

    def _state_bytes(self, tokens: int) -> float:
        return float(tokens * self._shape.config.hidden_size * self._load.itemsize)

    def _sum(self, layout: Layout, tokens: int) -> float:
        """One all-reduce of hidden states over a tensor group: inside its nodes, then between them."""
        num_bytes, nodes = self._state_bytes(tokens), layout.tensor_nodes
        if nodes == 1:
            return self._links.inside.all_reduce(num_bytes, layout.tensor_size)
        inside = self._links.inside.all_reduce(num_bytes, max(1, layout.tensor_size // nodes))
        return inside + self._links.between.all_reduce(num_bytes, nodes)

    def _talk(self, layer: Layer, layout: Layout, tokens: int) -> float:
        """Two sums a layer; where replicas share experts, one, and each token's way to its experts and back."""
        if not (layer.has_experts and layout.in_lockstep):
            return 2 * self._sum(layout, tokens)
        num_bytes = self._state_bytes(tokens) * min(self._shape.experts_per_token, layout.expert_size)
        link = self._link(layout.expert_nodes > 1)
        ranks = layout.expert_nodes if layout.expert_nodes > 1 else layout.expert_size
        if layout.expert_nodes > 1:  # one network card serves all ranks of a node
            num_bytes *= layout.expert_size / layout.expert_nodes
        return self._sum(layout, tokens) + 2 * link.all_to_all(num_bytes / layout.tensor_size, ranks)

    def _send(self, layout: Layout, boundary: int, tokens: int) -> float:
        """Hidden states to the next stage: each rank its part of the columns, which the receivers gather."""
        num_bytes = self._state_bytes(tokens)
        seconds = self._link(layout.crossings[boundary]).send(num_bytes)
        return seconds + self._links.inside.all_to_all(num_bytes, layout.tensor_size)

    # --- prompts -----------------------------------------------------------------------------------------------------

    def _prefill(self, layout: Layout) -> tuple[float, float]:
        """(prompt tokens a second of all replicas when there are always more, seconds to the first token alone)."""
        load = self._load
        tokens = min(load.num_batched_tokens, max(load.context, 1) * load.concurrency)
        context = min(load.context, tokens) // 2
        stages = range(layout.pipeline_size)
        slowest = max(self._stage(layout, stage, tokens, context, is_prompt=True) for stage in stages)
        alone = self._prompt_seconds(layout, load.prompt)
        return tokens * layout.data_size / slowest, alone + self._speeds.request

    def _prompt_seconds(self, layout: Layout, prompt: int) -> float:
        seconds, done = 0.0, 0
        while done < prompt:
            tokens = min(self._load.num_batched_tokens, prompt - done)
            for stage in range(layout.pipeline_size):
                seconds += self._stage(layout, stage, tokens, done + tokens // 2, is_prompt=True)
            seconds += sum(self._send(layout, boundary, tokens) for boundary in range(layout.pipeline_size - 1))
            done += tokens
        return seconds

    def request_seconds(self, layout: Layout, prompt: int, output: int) -> float:
        """One request alone, from its arrival to its last token: what `shoal bench latency` times."""
        first = self._prompt_seconds(layout, prompt) + self._speeds.request
        return first + (output - 1) * self._round(layout, 1, prompt + output // 2, 1)


def _counted(layers: tuple[Layer, ...]) -> list[tuple[Layer, int]]:
    counts: dict[Layer, int] = {}
    for layer in layers:
        counts[layer] = counts.get(layer, 0) + 1
    return list(counts.items())


def _speeds(device: Device, dtype: str) -> _Speeds:
    if device.is_cpu:
        rate = device.bf16_rate / (2 if dtype == "float32" else 1)
        return _Speeds(
            device.bandwidth, device.bandwidth, rate, rate / 2, CPU_LAYER_SECONDS, CPU_LAYER_SECONDS, STEP_SECONDS,
            CPU_REQUEST_SECONDS,
        )  # fmt: skip
    rate = {"bfloat16": device.bf16_rate, "float16": device.fp16_rate}.get(dtype, device.fp16_rate * _FP32_SHARE)
    return _Speeds(
        device.bandwidth * BANDWIDTH_SHARE,
        device.bandwidth * ATTENTION_BANDWIDTH_SHARE,
        rate * RATE_SHARE,
        rate * ATTENTION_RATE_SHARE,
        LAYER_SECONDS,
        EXPERT_SECONDS,
        STEP_SECONDS,
        REQUEST_SECONDS,
    )
