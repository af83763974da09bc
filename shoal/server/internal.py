"""/internal/v1/continue: a router's request in, frames out. The contract is protocol/internal.py.

A request that other servers have begun comes with a journal: it is prepared like any other, from the ids of its
prompts, and its answers go on from what was delivered.
"""

from __future__ import annotations

import math

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.answer_so_far import AnswerSoFar
from shoal.errors import InvalidRequestError
from shoal.protocol import internal
from shoal.protocol.chat import ChatCompletionRequest
from shoal.protocol.completions import CompletionRequest
from shoal.protocol.internal import AnswerJournal, ContinueRequest
from shoal.protocol.media_type import media_type_of, unsupported
from shoal.protocol.parsing import parse_body
from shoal.server.body import check_size, read_bytes
from shoal.server.chat import chat_generation
from shoal.server.completions import completion_generation
from shoal.server.frame_stream import FrameStream
from shoal.server.generation import Generation, Origin
from shoal.server.state import ServerState

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_MAX_ID_LENGTH = 256


def internal_router(state: ServerState) -> APIRouter:
    # Not in /docs: what stands there is for clients.
    router = APIRouter(include_in_schema=False)

    @router.post(internal.PATH)
    async def continue_request(request: Request) -> Response:
        """Answer a router's request, or go on with it."""
        wanted = await _read(request, state.options.max_request_bytes)
        generation = await _generation(state, wanted)
        _carry_on(generation, wanted, state.engine.config.model.vocab_size)
        return FrameStream(state.engine, generation)

    return router


async def _read(request: Request, max_request_bytes: int) -> ContinueRequest:
    """Raises InvalidRequestError, naming what is wrong, or RequestTooLargeError."""
    content_type = request.headers.get("content-type")
    if media_type_of(content_type) != internal.REQUEST_MEDIA_TYPE:
        raise unsupported(content_type, internal.REQUEST_MEDIA_TYPE)
    data = await read_bytes(request, max_request_bytes + internal.MAX_JOURNAL_BYTES)
    try:
        version = internal.version_of(data)
        if version != internal.VERSION:
            raise InvalidRequestError(
                f"the request speaks version {version} of {internal.PATH}; this server speaks {internal.VERSION}"
            )
        wanted = internal.decode_request(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"the body is no ContinueRequest in MessagePack: {error}") from None
    check_size(len(wanted.body), max_request_bytes)
    _check(wanted)
    return wanted


def _check(wanted: ContinueRequest) -> None:
    if not (0 < len(wanted.request_id) <= _MAX_ID_LENGTH and wanted.request_id.isprintable()):
        raise InvalidRequestError(
            f"request_id must be 1 to {_MAX_ID_LENGTH} printable characters; got {wanted.request_id[:50]!r}"
        )
    if not (math.isfinite(wanted.deadline_seconds) and wanted.deadline_seconds > 0):
        raise InvalidRequestError(f"deadline_seconds must be above 0; got {wanted.deadline_seconds}")
    if wanted.num_crashes < 0:
        raise InvalidRequestError(f"num_crashes must be 0 or more; got {wanted.num_crashes}")
    if wanted.answers and wanted.prompts is None:
        raise InvalidRequestError("there are answers but no prompts; the ids of the prompts must come with them")


async def _generation(state: ServerState, wanted: ContinueRequest) -> Generation:
    origin = Origin(request_id=wanted.request_id, created=wanted.created, seed=wanted.seed, prompts=wanted.prompts)
    if wanted.path == _CHAT:
        return await chat_generation(state, parse_body(ChatCompletionRequest, wanted.body), origin)
    if wanted.path == _COMPLETIONS:
        return await completion_generation(state, parse_body(CompletionRequest, wanted.body), origin)
    raise InvalidRequestError(f"path must be {_CHAT} or {_COMPLETIONS}; got {wanted.path[:100]!r}")


def _carry_on(generation: Generation, wanted: ContinueRequest, vocab_size: int) -> None:
    """What the router says of the request, and how far its answers have come. Raises InvalidRequestError."""
    n = generation.num_answers
    begun: list[dict[int, AnswerSoFar]] = [{} for _ in generation.prepared]
    for answer in wanted.answers:
        if not 0 <= answer.index < len(begun) * n:
            raise InvalidRequestError(
                f"the journal has an answer {answer.index}; the request has {len(begun) * n}, from 0"
            )
        prompt, index = divmod(answer.index, n)
        if index in begun[prompt]:
            raise InvalidRequestError(f"the journal has answer {answer.index} twice")
        begun[prompt][index] = _so_far(answer)
    for prompt, prepared in enumerate(generation.prepared):
        prepared.carry_on(begun[prompt], vocab_size, first_index=prompt * n)
        prepared.num_crashes = wanted.num_crashes
        prepared.deadline_seconds = wanted.deadline_seconds
        prepared.alone = wanted.alone
        prepared.held = False  # another server goes on when this engine is lost


def _so_far(answer: AnswerJournal) -> AnswerSoFar:
    return AnswerSoFar(
        token_ids=answer.token_ids,
        num_characters=answer.delivered_characters,
        logprobs=answer.logprobs,
        prompt_logprobs=answer.prompt_logprobs,
        num_cached_tokens=answer.num_cached_tokens,
        finish_reason=answer.finish_reason,
        stop_reason=answer.stop_reason,
    )
