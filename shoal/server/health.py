"""Probes. Alive, admitting and progressing are different things; /health wants all of them.

| path | 200 when |
|---|---|
| /livez | the engine core is there and gets on, or comes back, of several replicas one; else restart the server |
| /readyz | new requests are taken; send none while they are not, or while the engine is restarting |
| /health, /ping | as /readyz, and those that run get their tokens, on every replica that is there |

With several replicas the answer says how many are there ("replicas": "1 of 2").
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.async_engine import AsyncEngine
from shoal.errors import EngineDeadError, ShoalError, UnavailableError
from shoal.server.error_handlers import error_response
from shoal.server.generation import json_response
from shoal.server.state import ServerState


def health_router(state: ServerState) -> APIRouter:
    router = APIRouter(tags=["health"])
    engine = state.engine

    def answer(trouble: ShoalError | None) -> Response:
        if trouble is not None:
            return error_response(trouble)
        replicas = engine.replicas
        if len(replicas) == 1:
            return json_response({"status": "ok"})
        num_there = sum(replica.failure is None for replica in replicas)
        return json_response({"status": "ok", "replicas": f"{num_there} of {len(replicas)}"})

    async def is_alive(request: Request) -> Response:
        """Whether the engine core is there and gets on; where it stays so, the server is to be started anew."""
        return answer(_not_alive(engine))

    async def is_ready(request: Request) -> Response:
        """Whether new requests are taken."""
        return answer(_not_ready(engine))

    async def is_healthy(request: Request) -> Response:
        """Whether new requests are taken, and running ones get on."""
        return answer(_not_healthy(engine))

    for path, endpoint in (("/livez", is_alive), ("/readyz", is_ready), ("/health", is_healthy), ("/ping", is_healthy)):
        router.add_api_route(path, endpoint, methods=["GET"])
        router.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
    return router


def _not_alive(engine: AsyncEngine) -> ShoalError | None:
    """A stall that lasts counts as death: the server itself ends a core that stalls and starts it again within seconds,
    so a prober sees one for long only where that failed."""
    stalled = engine.stalled
    num_there = sum(replica.failure is None for replica in engine.replicas)
    if stalled and len(stalled) == num_there:
        return UnavailableError(f"{_names(engine, stalled)} no progress although there is work")
    return _gone(engine)


def _gone(engine: AsyncEngine) -> ShoalError | None:
    return None if engine.alive else EngineDeadError("the engine core is gone")


def _not_ready(engine: AsyncEngine) -> ShoalError | None:
    if engine.alive and not engine.admitting:
        return UnavailableError("the server is shutting down and takes no new requests")
    if engine.restarting:
        return UnavailableError(engine.why_restarting)
    return _gone(engine)


def _not_healthy(engine: AsyncEngine) -> ShoalError | None:
    trouble = _not_ready(engine)
    if trouble is None and (stalled := engine.stalled):
        return UnavailableError(f"{_names(engine, stalled)} no progress although there is work")
    return trouble


def _names(engine: AsyncEngine, stalled: Sequence[int]) -> str:
    if len(engine.replicas) == 1:
        return "the engine makes"
    numbers = ", ".join(map(str, stalled))
    return f"replica {numbers} makes" if len(stalled) == 1 else f"replicas {numbers} make"
