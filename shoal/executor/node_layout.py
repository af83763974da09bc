"""Which ranks run on which of the --nnodes machines, and what must be the same on all of them. Launcher and agents ask.

Machines are filled in order, replica by replica, so the neighbours of a tensor group share one where they fit.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

import msgspec

from shoal.config.engine_config import EngineConfig
from shoal.config.parallel import ParallelConfig
from shoal.version import __version__

# A node's own affair, or one where node 0's word counts without harm.
_OWN = {
    "generation",
    "parallel.node_rank",
    "parallel.data_rank",
    "parallel.token_file",
    "parallel.master_address",
    "parallel.startup_timeout",
    "parallel.step_timeout",
    "parallel.stall_timeout",
}
# How a user calls what the config calls otherwise.
_FLAGS = {
    "parallel.tensor_size": "tensor_parallel_size",
    "parallel.pipeline_size": "pipeline_parallel_size",
    "parallel.data_size": "data_parallel_size",
    "parallel.expert_parallel": "enable_expert_parallel",
    "parallel.num_nodes": "nnodes",
    "parallel.layer_partition": "pipeline_layer_partition",
}
_MOST_NAMED = 4


def ranks_per_node(parallel: ParallelConfig) -> int:
    """Those of all replicas together."""
    return parallel.world_size * parallel.data_size // parallel.num_nodes


def node_of(parallel: ParallelConfig, rank: int) -> int:
    """The node of a rank of this replica (`parallel.data_rank`)."""
    return (parallel.data_rank * parallel.world_size + rank) // ranks_per_node(parallel)


def ranks_on(parallel: ParallelConfig, node_rank: int) -> list[int]:
    """The ranks of this replica on a node; there may be none."""
    return [rank for rank in range(parallel.world_size) if node_of(parallel, rank) == node_rank]


def index_on_node(parallel: ParallelConfig, rank: int) -> int:
    """The place of a rank of this replica among all ranks of its node: 0, 1, 2 …"""
    return (parallel.data_rank * parallel.world_size + rank) % ranks_per_node(parallel)


def node_facts(config: EngineConfig) -> dict[str, str]:
    """What must be the same on all nodes: every setting but a node's own, the model's config, versions."""
    settings: dict[str, Any] = msgspec.to_builtins(config)
    model = settings.pop("model")
    facts = {
        _FLAGS.get(key, key.removeprefix("parallel.")): each
        for key, each in _flatten(settings).items()
        if key not in _OWN
    }
    # All else that is known of the model follows from these; names with _ are where it was saved from, and the like.
    model = model["raw"] | {"generation defaults": model["generation_defaults"], "end tokens": model["eos_token_ids"]}
    facts |= {f"the model's {key}": each for key, each in _flatten(model).items() if not key.startswith("_")}
    facts.pop("the model's transformers_version", None)
    texts = {name: json.dumps(value) for name, value in facts.items()}
    return texts | {
        "version of shoal": __version__,
        "version of Python": platform.python_version(),
        "version of torch": importlib.metadata.version("torch"),
    }


def describe_differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """ "tensor_parallel_size (4 there, 2 on node 0)"; empty where nothing differs."""
    names = [name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]
    words = [f"{name} ({theirs.get(name, 'none')} there, {ours.get(name, 'none')} on node 0)" for name in names]
    if len(words) > _MOST_NAMED:
        words[_MOST_NAMED:] = [f"{len(words) - _MOST_NAMED} more"]
    return ", ".join(words)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, each in value.items():
        found |= _flatten(each, f"{prefix}.{key}" if prefix else str(key))
    return found
