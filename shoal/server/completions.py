"""/v1/completions."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.prepare import PreparedRequest, Prompt
from shoal.errors import InvalidRequestError
from shoal.protocol.chunks import CompletionChunks
from shoal.protocol.completions import CompletionRequest
from shoal.protocol.responses import Completion
from shoal.protocol.whole import completion
from shoal.server.body import read_body
from shoal.server.documentation import body_of
from shoal.server.generation import Generation, Origin, off_the_loop, respond, stream_head
from shoal.server.state import ServerState
from shoal.types.outputs import RequestOutput


def completions_router(state: ServerState) -> APIRouter:
    router = APIRouter(tags=["generation"])

    @router.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        """Continue one or several prompts."""
        body = await read_body(request, CompletionRequest, state.options.max_request_bytes)
        return await respond(request, state, await completion_generation(state, body, Origin.of(request)))

    return router


async def completion_generation(state: ServerState, body: CompletionRequest, origin: Origin) -> Generation:
    """Validate and tokenize. Raises InvalidRequestError, NotFoundError, UnavailableError or EngineDeadError."""
    model = state.model_name(body.model)
    body.check()
    shown_id, engine_id = state.answer_ids(origin.request_id, "cmpl")
    prepared = await _prepare_all(state, body, origin, engine_id)
    for one in prepared:
        one.deadline_seconds = origin.deadline_seconds
    params = prepared[0].params
    head = stream_head(body, shown_id, "text_completion", origin, model)
    echo = [_text_of(state, one) for one in prepared] if body.echo else None
    make_logprobs = functools.partial(state.logprobs_builder, params.logprobs or 0, params.skip_special_tokens)

    def make_chunks() -> CompletionChunks:
        return CompletionChunks(
            head,
            [one.prompt_token_ids for one in prepared],
            params.n,
            echo=echo,
            only_echo=body.only_echo,
            make_logprobs=None if params.logprobs is None else make_logprobs,
        )

    def make_whole(outputs: Sequence[RequestOutput]) -> Completion:
        return completion(
            outputs,
            id=shown_id,
            created=origin.created,
            model=model,
            echo=echo,
            only_echo=body.only_echo,
            num_top=params.logprobs,
            make_logprobs=make_logprobs,
            return_token_ids=head.return_token_ids,
            return_prompt_logprobs=body.prompt_logprobs is not None,
        )

    return Generation(prepared=prepared, streams=bool(body.stream), make_chunks=make_chunks, make_whole=make_whole)


async def _prepare_all(
    state: ServerState, body: CompletionRequest, origin: Origin, engine_id: str
) -> list[PreparedRequest]:
    params = origin.seeded(body.to_sampling_params(state.model_defaults))
    prompts = body.prompts()
    num_answers = len(prompts) * params.n
    if num_answers > state.options.max_num_waiting:
        raise InvalidRequestError(
            f"{len(prompts)} prompts with {params.n} answers each are more than the {state.options.max_num_waiting} "
            "requests that may wait here (--max-num-waiting); send them in several requests",
            "prompt",
        )
    prepared = []
    for index, (prompt, ids) in enumerate(zip(prompts, origin.rendered(len(prompts)), strict=True)):
        prepare = functools.partial(
            state.engine.prepare,
            _prompt(prompt, ids),
            params,
            request_id=f"{engine_id}-{index}",
            priority=body.priority or 0,
            add_special_tokens=body.add_special_tokens is not False,
            adapter=state.engine.adapters.find(body.model),
        )
        prepared.append(await off_the_loop(len(prompt) if isinstance(prompt, str) and ids is None else 0, prepare))
        if index % 16 == 15:
            await asyncio.sleep(0)  # hundreds of prompts must not hold up the streams
    return prepared


def _prompt(prompt: str | list[int], ids: list[int] | None) -> Prompt:
    """ids: of a prompt that another server has tokenized already."""
    if ids is None:
        return prompt
    return {"prompt": prompt, "prompt_token_ids": ids} if isinstance(prompt, str) else ids


def _text_of(state: ServerState, prepared: PreparedRequest) -> str:
    """The prompt as the echo shows it."""
    if prepared.prompt is not None:
        return prepared.prompt
    skip = prepared.params.skip_special_tokens
    return state.tokenizer.decode(prepared.prompt_token_ids, skip_special_tokens=skip)
