"""Which executor an engine gets."""

from __future__ import annotations

from shoal.config.engine_config import EngineConfig
from shoal.executor.base import Executor
from shoal.executor.uniproc import UniprocExecutor


def make_executor(config: EngineConfig) -> Executor:
    """One rank: in-process."""
    return UniprocExecutor(config)
