"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.prepare import PreparedRequest
from shoal.protocol.chat import ChatCompletionRequest, prepare_messages
from shoal.protocol.chunks import ChatChunks
from shoal.protocol.responses import ChatCompletion
from shoal.protocol.whole import chat_completion
from shoal.server.body import read_body
from shoal.server.documentation import body_of
from shoal.server.generation import Generation, Origin, off_the_loop, respond, stream_head
from shoal.server.state import ServerState
from shoal.types.outputs import RequestOutput


def chat_router(state: ServerState) -> APIRouter:
    router = APIRouter(tags=["generation"])

    @router.post("/v1/chat/completions", openapi_extra=body_of(ChatCompletionRequest))
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        body = await read_body(request, ChatCompletionRequest, state.options.max_request_bytes)
        return await respond(request, state, await chat_generation(state, body, Origin.of(request)))

    return router


async def chat_generation(state: ServerState, body: ChatCompletionRequest, origin: Origin) -> Generation:
    """Validate and render. Raises InvalidRequestError, NotFoundError, UnavailableError or EngineDeadError."""
    model = state.model_name(body.model)
    body.check_stream_options()
    shown_id, engine_id = state.answer_ids(origin.request_id, "chatcmpl")
    prepared = await _prepare(state, body, origin, engine_id)
    prepared.deadline_seconds = origin.deadline_seconds
    params, role = prepared.params, state.options.response_role
    head = stream_head(body, shown_id, "chat.completion.chunk", origin, model)

    def make_chunks() -> ChatChunks:
        return ChatChunks(head, prepared.prompt_token_ids, params.n, role=role, token_bytes=state.token_bytes)

    def make_whole(outputs: Sequence[RequestOutput]) -> ChatCompletion:
        return chat_completion(
            outputs[0],
            id=shown_id,
            created=origin.created,
            model=model,
            role=role,
            num_top=params.logprobs,
            token_bytes=state.token_bytes,
            return_token_ids=head.return_token_ids,
        )

    return Generation(prepared=[prepared], streams=bool(body.stream), make_chunks=make_chunks, make_whole=make_whole)


async def _prepare(state: ServerState, body: ChatCompletionRequest, origin: Origin, engine_id: str) -> PreparedRequest:
    params = origin.seeded(body.to_sampling_params(state.model_defaults))
    template = state.request_template(body.chat_template)
    messages = prepare_messages(body.messages, template or state.template)
    priority, adapter = body.priority or 0, state.engine.adapters.find(body.model)
    (rendered,) = origin.rendered(1)
    if rendered is not None:
        return state.engine.prepare(rendered, params, request_id=engine_id, priority=priority, adapter=adapter)

    def prepare() -> PreparedRequest:
        return state.engine.prepare_chat(
            messages,
            params,
            request_id=engine_id,
            priority=priority,
            chat_template=template,
            add_generation_prompt=_generation_prompt(body),
            continue_final_message=bool(body.continue_final_message),
            chat_template_kwargs=body.chat_template_kwargs,
            add_special_tokens=bool(body.add_special_tokens),
            adapter=adapter,
        )

    size = sum(len(str(message.get("content", ""))) for message in messages)
    # A client's own template is a program: it may take its time, but not the other clients'.
    return await off_the_loop(size, prepare, always=template is not None)


def _generation_prompt(body: ChatCompletionRequest) -> bool:
    """On unless the client says otherwise, or continues a message instead."""
    if body.add_generation_prompt is None:
        return not body.continue_final_message
    return body.add_generation_prompt
