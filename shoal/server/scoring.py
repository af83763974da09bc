"""/v1/score and /v1/rerank, under all the paths that clients of vLLM, Jina and Cohere use."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.pooled import PairScore, prepare_pairs, scores_of
from shoal.protocol.pooling import (
    PoolingAnswer,
    PoolingBody,
    PoolingUsage,
    RerankAnswer,
    RerankDocument,
    RerankRequest,
    RerankResult,
    ScoreData,
    ScoreRequest,
)
from shoal.server.body import read_body
from shoal.server.documentation import body_of
from shoal.server.embeddings import check_number, run
from shoal.server.generation import Origin, json_response, off_the_loop
from shoal.server.state import ServerState

_SCORE_PATHS = ("/v1/score", "/score")
_RERANK_PATHS = ("/v1/rerank", "/rerank", "/v2/rerank")


def scoring_router(state: ServerState) -> APIRouter:
    router = APIRouter(tags=["pooling"])

    async def score(request: Request) -> Response:
        """How well texts belong together: one and one, one and several, or pair by pair."""
        body = await read_body(request, ScoreRequest, state.options.max_request_bytes)
        origin, model = Origin.of(request), state.model_name(body.model)
        shown_id, engine_id = state.answer_ids(origin.request_id, "score")
        scores = await _score(request, origin, state, body, body.pairs(), engine_id)
        data = [ScoreData(index, each.score) for index, each in enumerate(scores)]
        return json_response(PoolingAnswer(shown_id, origin.created, model, data, _usage(scores)))

    async def rerank(request: Request) -> Response:
        """Documents in the order of their relevance for a query."""
        body = await read_body(request, RerankRequest, state.options.max_request_bytes)
        origin, model = Origin.of(request), state.model_name(body.model)
        texts = body.texts()
        shown_id, engine_id = state.answer_ids(origin.request_id, "rerank")
        pairs = [(body.query, text) for text in texts]
        scores = await _score(request, origin, state, body, pairs, engine_id)
        results = [RerankResult(index, each.score) for index, each in enumerate(scores)]
        if body.return_documents is not False:
            for result, text in zip(results, texts, strict=True):
                result.document = RerankDocument(text)
        results.sort(key=lambda result: -result.relevance_score)
        return json_response(RerankAnswer(shown_id, model, _usage(scores), results[: body.top_n or None]))

    for paths, answer, kind in ((_SCORE_PATHS, score, ScoreRequest), (_RERANK_PATHS, rerank, RerankRequest)):
        for path in paths:
            router.add_api_route(
                path, answer, methods=["POST"], openapi_extra=body_of(kind), include_in_schema=path == paths[0]
            )
    return router


async def _score(
    request: Request,
    origin: Origin,
    state: ServerState,
    body: PoolingBody,
    pairs: Sequence[tuple[str, str]],
    engine_id: str,
) -> list[PairScore]:
    check_number(state, len(pairs), "documents" if isinstance(body, RerankRequest) else "text_2")
    params = body.params()
    prepared = await off_the_loop(
        sum(len(first) + len(second) for first, second in pairs),
        lambda: prepare_pairs(
            state.engine,
            pairs,
            params,
            truncate=body.truncate_prompt_tokens,
            request_id=engine_id,
            priority=body.priority or 0,
        ),
    )
    return scores_of(prepared, await run(request, origin, state, prepared.requests))


def _usage(scores: Sequence[PairScore]) -> PoolingUsage:
    """What was computed: a text that is in several pairs was read once where texts are read alone."""
    parts = {part.request.request_id: part for score in scores for part in score.parts}
    return PoolingUsage.of(sum(part.request.num_prompt_tokens for part in parts.values()))
