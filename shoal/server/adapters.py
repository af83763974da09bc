"""/v1/load_lora_adapter and /v1/unload_lora_adapter: adapters come and go while the server runs."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.async_engine import AsyncEngine
from shoal.errors import EngineDeadError, EngineError, InvalidRequestError
from shoal.protocol.adapters import LoadAdapterRequest, UnloadAdapterRequest
from shoal.server.body import read_body
from shoal.server.documentation import body_of
from shoal.server.generation import json_response
from shoal.server.state import ServerState
from shoal.types.sampling_params import SamplingParams


def adapters_router(state: ServerState) -> APIRouter:
    router = APIRouter(tags=["adapters"])

    @router.post("/v1/load_lora_adapter", openapi_extra=body_of(LoadAdapterRequest))
    async def load_adapter(request: Request) -> Response:
        """Serve an adapter; answered when the workers have it."""
        body = await read_body(request, LoadAdapterRequest, state.options.max_request_bytes)
        if body.lora_name in state.model_names:
            raise InvalidRequestError(f"the model itself is called {body.lora_name!r}", "lora_name")
        await load_and_try(state.engine, body.lora_name, body.lora_path, replace=bool(body.load_inplace))
        return json_response({"status": "loaded", "lora_name": body.lora_name})

    @router.post("/v1/unload_lora_adapter", openapi_extra=body_of(UnloadAdapterRequest))
    async def unload_adapter(request: Request) -> Response:
        """Serve an adapter no longer; its requests go on to their end."""
        body = await read_body(request, UnloadAdapterRequest, state.options.max_request_bytes)
        state.engine.adapters.unload(body.lora_name)
        return json_response({"status": "unloaded", "lora_name": body.lora_name})

    return router


async def load_and_try(engine: AsyncEngine, name: str, path: str, *, replace: bool = False) -> None:
    """Load an adapter, have a token made with it, and serve it then. Raises InvalidRequestError for one that does not
    fit."""
    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, ignore_eos=True)
    async with engine.adapters.trying(name, path, replace=replace) as adapter:
        try:
            await engine.collect(engine.prepare([0], params, adapter=adapter))
        except EngineDeadError:
            raise
        except EngineError as error:
            raise InvalidRequestError(f"the adapter {name!r} cannot be used: {error}", "lora_path") from None
