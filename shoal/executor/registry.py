"""Which executor an engine gets."""

from __future__ import annotations

import importlib
from typing import Any

from shoal.config.engine_config import EngineConfig
from shoal.executor.base import Executor
from shoal.executor.distributed import DistributedExecutor

# What places the ranks, by backend; "nodes" is mp on several machines. Loaded when chosen: Ray is an extra.
_LAUNCHERS = {
    "mp": ("shoal.executor.multiprocess", "LocalLauncher"),
    "nodes": ("shoal.executor.nodes", "NodesLauncher"),
    "ray": ("shoal.executor.ray", "RayLauncher"),
}


def make_executor(config: EngineConfig) -> Executor:
    """uni: the one rank lives in this process, and brings torch into it; else processes of their own."""
    if config.parallel.backend == "uni":
        uniproc: Any = importlib.import_module("shoal.executor.uniproc")
        return uniproc.UniprocExecutor(config)
    backend = "nodes" if config.parallel.backend == "mp" and config.parallel.num_nodes > 1 else config.parallel.backend
    module, name = _LAUNCHERS[backend]
    return DistributedExecutor(config, getattr(importlib.import_module(module), name)(config))
