"""`shoal serve`: options in, a running server out."""

from __future__ import annotations

import importlib.util

from shoal import env, log
from shoal.cli.client_options import CLIENT_SECTIONS
from shoal.cli.command import Command
from shoal.config.options import (
    CacheOptions,
    ModelOptions,
    ParallelOptions,
    RouterOptions,
    SchedulerOptions,
    ServerOptions,
)
from shoal.config.resolve import resolve
from shoal.config.sources import SERVE_SECTIONS, warn_about_environment
from shoal.errors import ConfigError
from shoal.executor.node_agent import work_for_node_0
from shoal.network.node_record import is_node


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
    engine_config = resolve(model, cache, scheduler, parallel, is_node=is_node())
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"the engine is not installed ({package} is missing): pip install 'shoal[engine]' brings it"
            )
    if engine_config.parallel.node_rank > 0:
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
