"""The layout of a server that was given none: `shoal serve` asks, on a machine with several GPUs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

from shoal.cluster.plan.devices import Machine
from shoal.cluster.plan.here import local_gpus
from shoal.cluster.plan.planner import Plan, Wish, make_plan
from shoal.cluster.plan.report import print_plan, refusal_text
from shoal.config.engine_config import EngineConfig
from shoal.config.options import ModelOptions, ParallelOptions, SchedulerOptions
from shoal.errors import ShoalError
from shoal.log import get_logger

# Options that say how the model is laid out: one that is set is what the user wants.
_LAYOUT = (
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "pipeline_layer_partition",
    "distributed_executor_backend", "nnodes", "nodes",
)  # fmt: skip

_logger = get_logger(__name__)


def lay_out(
    config: EngineConfig,
    model: ModelOptions,
    scheduler: SchedulerOptions,
    parallel: ParallelOptions,
    *,
    find_gpus: Callable[[], Machine | None] = local_gpus,
) -> ParallelOptions:
    """`parallel` as it is; or, where it says nothing, there are several GPUs and one of them does not hold the model,
    with the degrees of the plan, which is printed on standard error.

    config: of these options. Where nothing here can say what the GPUs are, nothing is said.
    """
    default = ParallelOptions()
    if any(getattr(parallel, name) != getattr(default, name) for name in _LAYOUT):
        return parallel
    machine = find_gpus()
    if machine is None or machine.num_devices < 2:
        return parallel
    wish = Wish(
        model=model.model,
        max_model_len=config.max_model_len,
        dtype=config.dtype,
        utilization=config.gpu_memory_utilization,
        deterministic=config.deterministic,
        scheduler=scheduler,
    )
    try:
        plan = make_plan(wish, machine)
    except ShoalError as error:
        _logger.warning("this machine has %d GPUs; they cannot be planned for: %s", machine.num_devices, error)
        return parallel
    return _take(plan, parallel)


def _take(plan: Plan, parallel: ParallelOptions) -> ParallelOptions:
    if plan.choice is None:
        _logger.warning("by the plan %s", refusal_text(plan))
        return parallel
    if any(candidate.layout.engine_ranks == 1 for candidate in plan.candidates):
        return parallel
    layout = plan.choice.candidate.layout
    print_plan(plan, file=sys.stderr)
    _logger.info(
        "one GPU does not hold this model, and no parallel sizes are given: taking tensor_parallel_size %d, "
        "pipeline_parallel_size %d, data_parallel_size %d",
        layout.tensor_size,
        layout.pipeline_size,
        layout.data_size,
    )
    return dataclasses.replace(
        parallel,
        tensor_parallel_size=layout.tensor_size,
        pipeline_parallel_size=layout.pipeline_size,
        data_parallel_size=layout.data_size,
    )
