"""/v1/embeddings."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.pooled import Pooled, pool_all, prepare_text
from shoal.engine.prepare import PreparedRequest
from shoal.errors import InvalidRequestError
from shoal.protocol.pooling import EmbeddingData, EmbeddingRequest, PoolingAnswer, PoolingUsage
from shoal.server.body import read_body
from shoal.server.documentation import body_of
from shoal.server.generation import Origin, json_response, off_the_loop
from shoal.server.state import ServerState
from shoal.server.stream import while_connected


def embeddings_router(state: ServerState) -> APIRouter:
    router = APIRouter(tags=["pooling"])

    @router.post("/v1/embeddings", openapi_extra=body_of(EmbeddingRequest))
    async def create_embeddings(request: Request) -> Response:
        """Vectors of one or several texts."""
        body = await read_body(request, EmbeddingRequest, state.options.max_request_bytes)
        origin = Origin.of(request)
        model = state.model_name(body.model)
        inputs, params = body.inputs(), body.params()
        check_number(state, len(inputs), "input")
        shown_id, engine_id = state.answer_ids(origin.request_id, "embd")

        def prepare() -> list[PreparedRequest]:
            return [
                prepare_text(
                    state.engine,
                    text,
                    params,
                    truncate=body.truncate_prompt_tokens,
                    request_id=f"{engine_id}-{index}",
                    priority=body.priority or 0,
                )
                for index, text in enumerate(inputs)
            ]

        prepared = await off_the_loop(sum(map(len, inputs)), prepare)
        results = await run(request, origin, state, prepared)
        as_base64 = body.encoding_format == "base64"
        data = [EmbeddingData(index, _shown(result, as_base64)) for index, result in enumerate(results)]
        usage = PoolingUsage.of(sum(one.num_prompt_tokens for one in prepared))
        return json_response(PoolingAnswer(shown_id, origin.created, model, data, usage))

    return router


async def run(
    request: Request, origin: Origin, state: ServerState, prepared: Sequence[PreparedRequest]
) -> list[Pooled]:
    """The results, unless the client goes away before."""
    for one in prepared:
        one.deadline_seconds = origin.deadline_seconds
    return await while_connected(request.receive, pool_all(state.engine, prepared))


def check_number(state: ServerState, number: int, param: str) -> None:
    """Raise InvalidRequestError for more texts than may wait."""
    if number > state.options.max_num_waiting:
        raise InvalidRequestError(
            f"{number} texts are more than the {state.options.max_num_waiting} requests that may wait here "
            "(--max-num-waiting); send them in several requests",
            param,
        )


def _shown(result: Pooled, as_base64: bool) -> list[float] | str:
    return base64.b64encode(result.data).decode() if as_base64 else result.numbers().tolist()
