"""`shoal serve`: options in, a running server out."""

from __future__ import annotations

import contextlib
import importlib.util

from shoal import env, log
from shoal.cli.client_options import CLIENT_SECTIONS
from shoal.cli.command import Command
from shoal.cluster.doctor.preflight import check_before_serving, is_wanted
from shoal.cluster.file_node import FileNode
from shoal.cluster.one_file import entrance, take_place
from shoal.config.options import (
    CacheOptions,
    ModelOptions,
    ParallelOptions,
    RouterOptions,
    SchedulerOptions,
    ServerOptions,
)
from shoal.config.resolve import num_gpus, resolve
from shoal.config.sources import SERVE_SECTIONS, warn_about_environment
from shoal.errors import ConfigError
from shoal.executor.node_agent import work_for_node_0
from shoal.network.node_record import is_node

# For machines of one file to be there, where --startup-timeout says nothing else.
_MACHINES_SECONDS = 600.0


def _run(
    model: ModelOptions,
    cache: CacheOptions,
    scheduler: SchedulerOptions,
    parallel: ParallelOptions,
    server: ServerOptions,
) -> int:
    log.configure(server.log_level)
    env.export_log_level(server.log_level)
    warn_about_environment((*SERVE_SECTIONS, RouterOptions, *CLIENT_SECTIONS))
    if not parallel.nodes:
        return _serve(model, cache, scheduler, parallel, server)
    parallel, server, place = take_place(model, parallel, server)
    if parallel.distributed_executor_backend != "ray" or place.num_machines == 1:
        return _serve(model, cache, scheduler, parallel, server, entrance(place, server))
    node = FileNode(place, parallel.token_file, parallel.startup_timeout or _MACHINES_SECONDS)
    with node.run_beside():
        if place.rank == 0:
            return _serve(model, cache, scheduler, parallel, server)
        with entrance(place, server):
            node.stay()
    return 0


def _serve(
    model: ModelOptions,
    cache: CacheOptions,
    scheduler: SchedulerOptions,
    parallel: ParallelOptions,
    server: ServerOptions,
    beside_agent: contextlib.AbstractContextManager[None] | None = None,
) -> int:
    """beside_agent: entered where this machine works for another one that holds the engine."""
    engine_config = resolve(model, cache, scheduler, parallel, is_node=is_node())
    if engine_config.device == "cuda" and num_gpus() > 1:
        # Loaded here: a machine with one device has nothing to plan.
        from shoal.cluster.plan.automatic import lay_out

        planned = lay_out(engine_config, model, scheduler, parallel)
        if planned is not parallel:
            engine_config = resolve(model, cache, scheduler, planned, is_node=is_node())
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"the engine is not installed ({package} is missing): pip install 'shoal[engine]' brings it"
            )
    if server.model_label is not None:
        log.get_logger(__name__).info("model %s: %s", model.model, server.model_label)
    if is_wanted(engine_config.parallel) and not server.skip_preflight:
        check_before_serving(model.model, engine_config.parallel, has_weights=model.load_format != "dummy")
    if engine_config.parallel.node_rank > 0:
        with beside_agent or contextlib.nullcontext():
            work_for_node_0(engine_config)
        return 0
    # Loaded here, since it cannot be without the packages that were just looked for.
    from shoal.server.run import serve

    serve(engine_config, server, model)
    return 0


COMMAND = Command(
    name="serve",
    description="Serve a model behind the OpenAI API. Without MODEL it is shoal-tiny, which comes with Shoal. "
    "Ctrl-C lets running requests finish.",
    sections=SERVE_SECTIONS,
    positional="model",
    takes_config=True,
    run=_run,
)
