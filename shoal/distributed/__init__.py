"""Ranks and groups: the grid, the collectives, and what this process's place in them is.

Shoal itself passes groups as arguments. The functions here are a read-only face on the groups that this process's
worker has registered, for models and plug-ins written by users. Importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shoal.distributed.parallel_dims import ParallelDims
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from shoal.distributed.group import GroupCoordinator
    from shoal.distributed.rendezvous import ParallelGroups

__all__ = [
    "GroupCoordinator",
    "ParallelDims",
    "ParallelGroups",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_pipeline_model_parallel_rank",
    "get_pipeline_model_parallel_world_size",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "get_tp_group",
    "get_pp_group",
    "model_parallel_is_initialized",
    "set_parallel_groups",
]

# These need torch, so they are loaded when first used.
_HOMES = {"GroupCoordinator": "shoal.distributed.group", "ParallelGroups": "shoal.distributed.rendezvous"}

_groups: ParallelGroups | None = None


def set_parallel_groups(groups: ParallelGroups | None) -> None:
    """The worker registers its groups when they are formed, and None when it closes them."""
    global _groups
    _groups = groups


def model_parallel_is_initialized() -> bool:
    """Whether this process is a worker whose groups are formed: the other functions answer then."""
    return _groups is not None


def get_tensor_model_parallel_rank() -> int:
    """This process's position among the ranks that share its layers: 0 to world size − 1; 0 when it is alone."""
    return _registered().dims.tensor_rank


def get_tensor_model_parallel_world_size() -> int:
    """How many ranks share this process's layers; 1 without tensor parallelism."""
    return _registered().dims.tensor_size


def get_pipeline_model_parallel_rank() -> int:
    """This process's pipeline stage: 0 embeds, the last one has the head; 0 when there is one stage."""
    return _registered().dims.pipeline_rank


def get_pipeline_model_parallel_world_size() -> int:
    """How many pipeline stages there are; 1 without pipeline parallelism."""
    return _registered().dims.pipeline_size


def get_data_parallel_rank() -> int:
    """Which replica of the model this process belongs to, among those in its grid."""
    return _registered().dims.data_rank


def get_data_parallel_world_size() -> int:
    """How many replicas of the model there are in this process's grid."""
    return _registered().dims.data_size


def get_tp_group() -> GroupCoordinator:
    """The collectives among the ranks that share this process's layers."""
    return _registered().tensor


def get_pp_group() -> GroupCoordinator:
    """Sends and collectives among the stages that this process's requests pass."""
    return _registered().pipeline


def _registered() -> ParallelGroups:
    if _groups is None:
        raise ShoalError(
            "this process has no parallel groups: they exist in workers of a running engine, once its ranks have met "
            "(model_parallel_is_initialized() says whether)"
        )
    return _groups


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'shoal.distributed' has no attribute {name!r}")
