"""ModelRank: a worker and the groups that it works in. The worker's process makes one when it knows its setup."""

from __future__ import annotations

import dataclasses
import hashlib
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shoal.config.engine_config import EngineConfig
from shoal.distributed import set_parallel_groups
from shoal.distributed.meeting import tcp_store
from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.rendezvous import form_groups
from shoal.errors import ModelError
from shoal.messages import BatchResult, ScheduledBatch, StartupProgress, WorkerSetup
from shoal.worker.device import find_device
from shoal.worker.process import OnProgress, Seat
from shoal.worker.worker import Worker

# The executor explains a step that does not end, so a collective waits a little longer than it does; at the start the
# ranks know best who is missing, so they speak first.
_AFTER_EXECUTOR_SECONDS = 10.0
_BEFORE_EXECUTOR = 0.9


class ModelRank:
    """See `process.Rank`."""

    def __init__(self, setup: WorkerSetup, config: EngineConfig, seat: Seat, store: Any, timeout: float) -> None:
        """Returns when all ranks have met. store: torch's, of the rendezvous; None for a rank alone.

        timeout: seconds for each of its phases.
        """
        parallel = config.parallel
        dims = ParallelDims(
            tensor_size=parallel.tensor_size,
            pipeline_size=parallel.pipeline_size,
            rank=seat.rank,
            expert_parallel=parallel.expert_parallel,
        )
        self._groups = form_groups(
            dims,
            device=find_device(config.device, setup.device_index),
            address=seat.address,
            store=store,
            startup_timeout=timeout,
            timeout=parallel.step_timeout + _AFTER_EXECUTOR_SECONDS,
            generation=config.generation,
            facts=_facts(config),
            names=setup.names,
        )
        set_parallel_groups(self._groups)
        self._worker = Worker(config, self._groups, device_index=setup.device_index, local_size=setup.local_size)
        self.is_output = seat.rank == parallel.output_rank
        self.is_asynchronous = config.device != "cpu"
        self.status_address = self._groups.status_address or ""

    def read_status(self) -> bytes:
        return self._groups.status.raw()

    def load(self, on_progress: OnProgress) -> tuple[int, dict[str, Any]]:
        return self._worker.load(on_progress)

    def allocate(self, num_blocks: int, on_progress: OnProgress) -> dict[str, Any]:
        return self._worker.allocate(num_blocks, on_progress)

    def execute(self, batch: ScheduledBatch) -> None:
        self._worker.execute(batch)

    def sample(self, step_id: int, grammar_masks: dict[int, bytes] | None) -> Callable[[], BatchResult]:
        return self._worker.sample(step_id, grammar_masks)

    def idle(self) -> None:
        self._worker.idle()

    def shutdown(self) -> None:
        self._worker.shutdown()
        set_parallel_groups(None)
        self._groups.close()


def make_model_rank(
    setup: WorkerSetup,
    seat: Seat,
    model_path: str | None,
    started: float,
    on_progress: OnProgress,
) -> ModelRank:
    """model_path: of the model on this host, where it is not the executor's. started: when the setup came."""
    config = EngineConfig.from_json(setup.config)
    if model_path is not None:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=model_path))
    on_progress(StartupProgress("rendezvous"))
    timeout = max(config.parallel.startup_timeout * _BEFORE_EXECUTOR - (time.monotonic() - started), 1.0)
    store = None
    if config.parallel.world_size > 1:
        store = tcp_store(setup.store_address, setup.store_port, seat.rank, timeout, seat.listener)
    return ModelRank(setup, config, seat, store, timeout)


def _facts(config: EngineConfig) -> dict[str, str]:
    """What must be equal on all ranks beyond the versions in the hello: what takes torch, or the model's files."""
    path = Path(config.model.path) / "config.json"
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(
            f"the model's config cannot be read on {socket.gethostname()}: {error}; every host needs the model under "
            "the same path"
        ) from error
    facts = {"model config (sha256)": digest}
    if config.device == "cuda":
        facts["NCCL version"] = ".".join(map(str, torch.cuda.nccl.version()))
        facts["CUDA version of torch"] = str(torch.version.cuda)
    return facts
