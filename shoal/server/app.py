"""create_app: the OpenAI API over an engine, as an ASGI app. `server/run.py` serves it; tests do too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from shoal.config.options import ModelOptions, ServerOptions
from shoal.engine.async_engine import AsyncEngine
from shoal.network.http_server import Cors
from shoal.observability.metrics import EngineMetrics
from shoal.server.adapters import adapters_router
from shoal.server.chat import chat_router
from shoal.server.completions import completions_router
from shoal.server.documentation import complete_openapi
from shoal.server.embeddings import embeddings_router
from shoal.server.error_handlers import install_error_handlers
from shoal.server.health import health_router
from shoal.server.internal import internal_router
from shoal.server.middleware import STATIC_PATH, Authentication, InternalAccess, RequestContext
from shoal.server.models import models_router
from shoal.server.scoring import scoring_router
from shoal.server.state import ServerState
from shoal.server.tokenization import tokenization_router
from shoal.version import __version__


def create_app(
    engine: AsyncEngine,
    options: ServerOptions,
    model: ModelOptions,
    *,
    metrics: EngineMetrics | None = None,
    facts: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    internal_secret: str | None = None,
) -> FastAPI:
    """The app over a started engine, whose start and end are the caller's.

    metrics: what the engine's MetricsObserver counts into. facts: what /version tells of the engine.
    chat_template: the Jinja text that the engine's tokenizer was given in place of the model's. internal_secret: what
    routers must show at /internal/….
    """
    state = ServerState.make(engine, options, model, metrics, facts, chat_template)
    # /docs with its scripts served from here: many machines that serve models reach nothing outside.
    app = FastAPIOffline(
        title="Shoal",
        version=__version__,
        description="The OpenAI API, served by Shoal.",
        redoc_url=None,
        static_url=STATIC_PATH,
    )
    for make_router in (
        chat_router, completions_router, embeddings_router, scoring_router, tokenization_router, models_router,
        adapters_router, health_router, internal_router,
    ):  # fmt: skip
        app.include_router(make_router(state))
    complete_openapi(app)
    install_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(Authentication, keys=options.api_key)
    app.add_middleware(InternalAccess, secret=internal_secret, has_keys=bool(options.api_key))
    app.add_middleware(Cors, options=options)
    app.add_middleware(RequestContext, log_requests=not options.disable_log_requests)
    return app
