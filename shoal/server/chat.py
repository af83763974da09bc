"""/v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.prepare import PreparedRequest
from shoal.protocol.chat import ChatCompletionRequest, prepare_messages
from shoal.protocol.chunks import ChatChunks
from shoal.protocol.whole import chat_completion
from shoal.server.body import read_body
from shoal.server.documentation import body_of
from shoal.server.generation import collect_all, json_response, off_the_loop, stream_head
from shoal.server.state import ServerState
from shoal.server.stream import EventStream, while_connected


def chat_router(state: ServerState) -> APIRouter:
    router = APIRouter(tags=["generation"])

    @router.post("/v1/chat/completions", openapi_extra=body_of(ChatCompletionRequest))
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        body = await read_body(request, ChatCompletionRequest, state.options.max_request_bytes)
        model = state.model_name(body.model)
        body.check_stream_options()
        shown_id, engine_id = state.answer_ids(request, "chatcmpl")
        prepared = await _prepare(state, body, engine_id)
        head = stream_head(body, shown_id, "chat.completion.chunk", model)
        engine, role = state.engine, state.options.response_role
        if body.stream:
            chunks = ChatChunks(
                head, prepared.prompt_token_ids, prepared.params.n, role=role, token_bytes=state.token_bytes
            )
            return EventStream(engine.stream(prepared), chunks)
        (output,) = await while_connected(request.receive, collect_all(engine, [prepared]))
        return json_response(
            chat_completion(
                output,
                id=shown_id,
                created=head.created,
                model=model,
                role=role,
                num_top=prepared.params.logprobs,
                token_bytes=state.token_bytes,
                return_token_ids=head.return_token_ids,
            )
        )

    return router


async def _prepare(state: ServerState, body: ChatCompletionRequest, engine_id: str) -> PreparedRequest:
    params = body.to_sampling_params(state.model_defaults)
    template = state.request_template(body.chat_template)
    messages = prepare_messages(body.messages, template or state.template)

    def prepare() -> PreparedRequest:
        return state.engine.prepare_chat(
            messages,
            params,
            request_id=engine_id,
            priority=body.priority or 0,
            chat_template=template,
            add_generation_prompt=_generation_prompt(body),
            continue_final_message=bool(body.continue_final_message),
            chat_template_kwargs=body.chat_template_kwargs,
            add_special_tokens=bool(body.add_special_tokens),
        )

    size = sum(len(str(message.get("content", ""))) for message in messages)
    # A client's own template is a program: it may take its time, but not the other clients'.
    return await off_the_loop(size, prepare, always=template is not None)


def _generation_prompt(body: ChatCompletionRequest) -> bool:
    """On unless the client says otherwise, or continues a message instead."""
    if body.add_generation_prompt is None:
        return not body.continue_final_message
    return body.add_generation_prompt
