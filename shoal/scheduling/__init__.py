"""Scheduler, block pool and prefix cache: which request gets which blocks in which step. No tensors, no torch."""

from shoal.scheduling.block_pool import NULL_BLOCK, BlockPool
from shoal.scheduling.connector import KVConnector, NullConnector
from shoal.scheduling.scheduler import Scheduler
from shoal.scheduling.scheduler_config import SchedulerConfig, SchedulerCounters

__all__ = [
    "NULL_BLOCK",
    "BlockPool",
    "KVConnector",
    "NullConnector",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerCounters",
]
