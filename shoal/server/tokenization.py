"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from shoal.errors import InvalidRequestError
from shoal.protocol.chat import prepare_messages
from shoal.protocol.tokenization import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from shoal.server.body import read_body
from shoal.server.documentation import body_of
from shoal.server.generation import json_response, off_the_loop
from shoal.server.state import ServerState


def tokenization_router(state: ServerState) -> APIRouter:
    router = APIRouter(tags=["tokenization"])

    @router.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """The token ids of a text, or of a conversation as the chat template renders it."""
        body = await read_body(request, TokenizeRequest, state.options.max_request_bytes)
        state.model_name(body.model)
        body.check()
        tokenizer = state.tokenizer
        if body.prompt is not None:
            text, special = body.prompt, body.add_special_tokens is not False
        else:
            text, special = _render(state, body), bool(body.add_special_tokens)
        tokens = await off_the_loop(len(text), lambda: tokenizer.encode(text, add_special_tokens=special))
        strings = [tokenizer.token_text(token_id) for token_id in tokens] if body.return_token_strs else None
        return json_response(TokenizeResponse(len(tokens), state.engine.max_model_len, tokens, strings))

    @router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens included."""
        body = await read_body(request, DetokenizeRequest, state.options.max_request_bytes)
        state.model_name(body.model)
        tokenizer = state.tokenizer
        size = max(tokenizer.vocab_size, state.engine.config.model.vocab_size)
        for token_id in body.tokens:
            if not 0 <= token_id < size:
                raise InvalidRequestError(
                    f"tokens holds {token_id}, which is no token id of this model (0 to {size - 1})", "tokens"
                )
        text = await off_the_loop(len(body.tokens), lambda: tokenizer.decode(body.tokens, skip_special_tokens=False))
        return json_response(DetokenizeResponse(text))

    return router


def _render(state: ServerState, body: TokenizeRequest) -> str:
    messages: list[dict[str, Any]] = body.messages or []
    generation = body.add_generation_prompt
    template = state.request_template(body.chat_template)
    return state.tokenizer.apply_chat_template(
        prepare_messages(messages, template or state.template),
        chat_template=template,
        add_generation_prompt=not body.continue_final_message if generation is None else generation,
        continue_final_message=bool(body.continue_final_message),
        chat_template_kwargs=body.chat_template_kwargs,
    )
