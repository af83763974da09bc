"""/v1/models, /version and /metrics: what there is, and how it does."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from shoal.observability.metrics import CONTENT_TYPE
from shoal.protocol.internal import CAPABILITY
from shoal.protocol.responses import ModelCard, ModelList
from shoal.server.generation import json_response
from shoal.server.state import ServerState
from shoal.version import __version__


def models_router(state: ServerState) -> APIRouter:
    router = APIRouter(tags=["information"])

    def card(name: str) -> ModelCard:
        adapter = state.engine.adapters.find(name)
        if adapter is None:
            return ModelCard(name, state.started, state.engine.max_model_len)
        return ModelCard(
            name, state.started, state.engine.max_model_len, root=adapter.path, parent=state.model_names[0]
        )

    @router.get("/v1/models")
    async def list_models(request: Request) -> Response:
        """The names that the model is served under."""
        return json_response(ModelList([card(name) for name in (*state.model_names, *state.engine.adapters.names)]))

    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str, request: Request) -> Response:
        """One model."""
        return json_response(card(state.model_name(model_id)))

    @router.get("/version")
    async def get_version(request: Request) -> Response:
        """The version of Shoal, what it offers to routers, and facts about the running engine."""
        parallel = state.engine.config.parallel
        degrees = {
            "tensor_parallel_size": parallel.tensor_size,
            "pipeline_parallel_size": parallel.pipeline_size,
            "data_parallel_size": parallel.data_size,
            "enable_expert_parallel": parallel.expert_parallel,
        }
        engine = {**degrees, **state.facts}
        return json_response({"version": __version__, "internal": [CAPABILITY], "engine": engine})

    @router.get("/metrics")
    async def get_metrics(request: Request) -> Response:
        """Prometheus metrics."""
        engine, metrics = state.engine, state.metrics
        metrics.replicas_up = {replica.index: replica.failure is None for replica in engine.replicas}
        metrics.num_restarts = engine.num_restarts
        metrics.num_requests_continued = engine.num_requests_continued
        metrics.num_tokens_replayed = engine.num_tokens_replayed
        return Response(state.metrics.render(), media_type=CONTENT_TYPE)

    return router
