"""ParallelConfig: how one engine is spread over ranks and hosts. Checked against the model before anything starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from shoal.config.model_config import ModelConfig
from shoal.errors import ConfigError

# Deterministic mode sums row-parallel products over this many virtual shards, so a degree must divide it.
NUM_VIRTUAL_SHARDS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the axes and where the ranks run. The default is one rank in the core's own process.

    data_rank: which replica this engine is; its ranks are 0 … world_size − 1 whatever the replica. expert_parallel:
    tensor ranks share the experts of a layer whole, instead of a part of each.
    layer_partition: layers of each pipeline stage. backend: "uni", "mp" (subprocesses; with num_nodes above 1 the same
    command on each of them) or "ray". master_address, master_port: where node 0 takes the other nodes' workers in.
    startup_timeout, step_timeout: seconds for each phase of the start, and for one step. stall_timeout: seconds without
    a sign of any rank within a step; 0: never.
    """

    tensor_size: int = 1
    pipeline_size: int = 1
    data_size: int = 1
    data_rank: int = 0
    expert_parallel: bool = False
    layer_partition: tuple[int, ...] | None = None
    backend: str = "uni"
    num_nodes: int = 1
    node_rank: int = 0
    master_address: str | None = None
    master_port: int = 29500
    token_file: str | None = None
    startup_timeout: float = 600.0
    step_timeout: float = 300.0
    stall_timeout: float = 0.0

    @property
    def world_size(self) -> int:
        """Ranks of one engine (one replica)."""
        return self.tensor_size * self.pipeline_size

    @property
    def output_rank(self) -> int:
        """The rank whose results the executor takes: the first of the last stage."""
        return (self.pipeline_size - 1) * self.tensor_size


def check_degrees(model: ModelConfig, parallel: ParallelConfig, *, deterministic: bool) -> None:
    """Raise ConfigError for degrees that this model cannot be cut into, naming those that work."""
    tensor, by_expert = parallel.tensor_size, parallel.expert_parallel
    possible = [degree for degree in range(1, model.num_heads + 1) if _fits(model, degree, deterministic, by_expert)]
    if tensor not in possible:
        widths = [f"{name} {width}" for name, width in _widths(model, by_expert).items()]
        if by_expert and model.experts is not None:
            widths.append(f"{model.experts.num_experts} experts to share whole")
        raise ConfigError(
            f"tensor_parallel_size {tensor} does not fit this model ({model.num_heads} attention heads, "
            f"{model.num_kv_heads} KV heads, {', '.join(widths)}"
            f"{', deterministic mode' if deterministic else ''}); these work: {', '.join(map(str, possible))}"
        )
    if parallel.pipeline_size > model.num_layers:
        raise ConfigError(
            f"pipeline_parallel_size {parallel.pipeline_size} is more than the model's {model.num_layers} layers; "
            f"1 to {model.num_layers} work"
        )
    partition = parallel.layer_partition
    if partition is None:
        return
    if len(partition) != parallel.pipeline_size or sum(partition) != model.num_layers or min(partition) < 1:
        example = ",".join(map(str, balance_layers(model, parallel.pipeline_size)))
        raise ConfigError(
            f"pipeline_layer_partition {','.join(map(str, partition))} must give each of the "
            f"{parallel.pipeline_size} stages at least one layer and {model.num_layers} in all; {example} works"
        )


def _widths(model: ModelConfig, by_expert: bool) -> dict[str, int]:
    """The MLPs' sizes that tensor ranks split, by what they are called. by_expert: experts are shared whole."""
    experts = model.experts
    if experts is None:
        return {"intermediate size": model.intermediate_size}
    widths = {}
    if len(experts.layers) < model.num_layers:
        widths["intermediate size"] = model.intermediate_size
    if not by_expert:
        widths["intermediate size of an expert"] = experts.intermediate_size
    if experts.shared_size:
        widths["shared intermediate size"] = experts.shared_size
    return widths


def _fits(model: ModelConfig, degree: int, deterministic: bool, by_expert: bool) -> bool:
    widths = list(_widths(model, by_expert).values())
    if model.num_heads % degree or any(width % degree for width in widths):
        return False
    if by_expert and model.experts is not None and degree > model.experts.num_experts:
        return False
    if model.num_kv_heads % degree and degree % model.num_kv_heads:
        return False
    if degree > 1 and not _cuts_whole_units(model, degree, widths):
        return False
    if not deterministic:
        return True
    # Each rank holds whole shards of the fixed tree, in every row-parallel layer.
    row_inputs = (model.num_heads * model.head_dim, *widths)
    return all(virtual_shards(inputs) % degree == 0 for inputs in row_inputs)


def _cuts_whole_units(model: ModelConfig, degree: int, widths: Sequence[int]) -> bool:
    """Whether no group, block or packed number of a quantized matrix would lie on two ranks."""
    quantization = model.quantization
    if quantization is None or quantization.on_the_fly:
        return True
    heads, parts = model.num_heads * model.head_dim // degree, [width // degree for width in widths]
    kv_heads = max(1, model.num_kv_heads // degree) * model.head_dim
    cuts_inputs = all(size % quantization.input_unit == 0 for size in (heads, *parts))
    return cuts_inputs and all(size % quantization.output_unit == 0 for size in (heads, kv_heads, *parts))


def virtual_shards(in_features: int) -> int:
    """Deterministic mode: shards that a row-parallel layer's inputs are cut into, the largest power of two up to
    NUM_VIRTUAL_SHARDS that divides them: a matter of the model alone."""
    shards = NUM_VIRTUAL_SHARDS
    while in_features % shards:
        shards //= 2
    return shards


def balance_layers(model: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """Layers per stage such that the slowest stage is as fast as can be; the first embeds and the last has the head.

    Costs are weights read per token: attention and MLP for a layer, of experts those that a token goes to, and the
    vocabulary projection for the head. The embedding reads one row a token, but its sampled ids come from the last
    stage: it counts a hundredth of a layer.
    """
    hidden = model.hidden_size
    attention = hidden * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    # A gated MLP has three matrices; counting three where there are two shifts nothing that matters.
    costs = [float(attention + 3 * hidden * model.intermediate_size)] * model.num_layers
    if (experts := model.experts) is not None:
        width = experts.num_per_token * experts.intermediate_size + experts.shared_size
        for index in experts.layers:
            costs[index] = float(attention + hidden * (3 * width + experts.num_experts))
    return balance(costs, num_stages, first=costs[0] / 100, last=float(model.vocab_size * hidden))


def balance(costs: Sequence[float], num_stages: int, *, first: float = 0.0, last: float = 0.0) -> tuple[int, ...]:
    """Cut `costs` into `num_stages` runs of at least one, the greatest sum least; `first` and `last` are added to the
    sums of the first and the last run. Returns the lengths; of equal cuts the one with fewer in the later stages."""
    num_layers = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[stage][end]: (greatest sum, where the stage begins) with the first `end` layers in stages 0 … stage.
    best: list[dict[int, tuple[float, int]]] = []
    for stage in range(num_stages):
        row: dict[int, tuple[float, int]] = {}
        for end in range(stage + 1, num_layers - (num_stages - 1 - stage) + 1):
            extra = (first if stage == 0 else 0.0) + (last if stage == num_stages - 1 else 0.0)
            starts = [0] if stage == 0 else range(stage, end)
            row[end] = min(
                (max(sums[end] - sums[start] + extra, best[stage - 1][start][0] if stage else 0.0), -start)
                for start in starts
            )
        best.append({end: (value, -start) for end, (value, start) in row.items()})
    lengths: list[int] = []
    end = num_layers
    for stage in reversed(range(num_stages)):
        start = best[stage][end][1]
        lengths.append(end - start)
        end = start
    return tuple(reversed(lengths))
