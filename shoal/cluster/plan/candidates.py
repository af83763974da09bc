"""Candidates: layouts with the memory of their fullest rank, what they hold, and what they would be like."""

from __future__ import annotations

import dataclasses

from shoal.cluster.plan.cost import CostModel, Prediction
from shoal.cluster.plan.devices import Machine
from shoal.cluster.plan.links import Links
from shoal.cluster.plan.memory import Load, RankMemory, rank_memory, request_tokens, stage_layers, token_cache_bytes
from shoal.cluster.plan.placement import Layout, Rejection, layouts, partition
from shoal.cluster.plan.shape import ModelShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that fits. memory: of the fullest rank, that with the least room for the cache's tokens.

    cache_bytes: of that rank. cache_tokens, capacity (requests of full length): of all replicas together.
    """

    layout: Layout
    memory: RankMemory
    cache_bytes: int
    cache_tokens: int
    capacity: int
    prediction: Prediction

    @property
    def left_bytes(self) -> int:
        """Of the budget: what the cache has no use for."""
        return self.memory.cache - self.cache_bytes


def survey(
    shape: ModelShape, machine: Machine, links: Links, load: Load, *, deterministic: bool = False
) -> tuple[list[Candidate], list[Rejection]]:
    """All layouts: those that fit, and why the others do not."""
    model = CostModel(shape, machine.device, links, load)
    fitting: list[Candidate] = []
    rejected: list[Rejection] = []
    for each in layouts(shape, machine, deterministic=deterministic):
        if isinstance(each, Rejection):
            rejected.append(each)
            continue
        layout = dataclasses.replace(each, partition=partition(shape, each.pipeline_size))
        room = measure(shape, layout, machine, load)
        if isinstance(room, Rejection):
            rejected.append(room)
            continue
        memory, cache_bytes, tokens = room
        capacity = tokens // request_tokens(load) * layout.data_size
        fitting.append(
            Candidate(
                layout=layout,
                memory=memory,
                cache_bytes=cache_bytes,
                cache_tokens=tokens * layout.data_size,
                capacity=capacity,
                prediction=model.predict(layout, capacity),
            )
        )
    return fitting, rejected


def measure(shape: ModelShape, layout: Layout, machine: Machine, load: Load) -> tuple[RankMemory, int, int] | Rejection:
    """(memory of the fullest rank, bytes of its cache, tokens that a replica's cache holds).

    As the engine sizes it: whole blocks, one of them for padding, no more than all requests could ever fill, and every
    stage as many as the fullest has room for.
    """
    least: tuple[int, RankMemory, int] | None = None
    for stage in range(layout.pipeline_size):
        memory = rank_memory(shape, layout.cut, stage, machine.device, load, layout.engine_ranks)
        layers = stage_layers(shape, layout.cut, stage)
        token_bytes = token_cache_bytes(layers, load.kv_itemsize, layout.tensor_size)
        num_blocks = memory.cache // (load.block_size * token_bytes) if memory.cache > 0 else 0
        key = (num_blocks, memory, token_bytes)
        if least is None or (num_blocks, memory.cache) < (least[0], least[1].cache):
            least = key
    assert least is not None, "a layout has a stage"
    num_blocks, memory, token_bytes = least
    full = request_tokens(load) // load.block_size
    needed = full + 1
    if num_blocks < needed:
        return _too_small(layout, memory, needed * load.block_size * token_bytes)
    num_blocks = min(num_blocks, load.num_seqs * full + 1)
    return memory, num_blocks * load.block_size * token_bytes, (num_blocks - 1) * load.block_size


def _too_small(layout: Layout, memory: RankMemory, request_bytes: int) -> Rejection:
    taken = memory.budget - memory.cache
    return Rejection(
        tensor_size=layout.tensor_size,
        pipeline_size=layout.pipeline_size,
        data_size=layout.data_size,
        shares_experts=layout.shares_experts,
        reason=(
            f"a rank has {max(0, memory.budget) / 2**30:.1f} GiB; weights take {memory.weights / 2**30:.1f}, all else "
            f"but the cache {(taken - memory.weights) / 2**30:.1f}, one request's cache {request_bytes / 2**30:.2f}"
        ),
    )
