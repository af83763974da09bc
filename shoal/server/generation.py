"""What chat and completions have in common: a Generation is made of a body, and answered.

Used by chat.py and completions.py, and by internal.py, which sends the same in frames.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.async_engine import AsyncEngine
from shoal.engine.journal import DEFAULT_DEADLINE_SECONDS
from shoal.engine.prepare import PreparedRequest
from shoal.errors import InvalidRequestError, UnavailableError
from shoal.protocol.chunks import ChunkStream, StreamHead
from shoal.protocol.deadline import DEADLINE_HEADER, read_deadline
from shoal.protocol.fields import GenerationBody
from shoal.protocol.responses import ChatCompletion, Completion
from shoal.server.state import ServerState
from shoal.server.stream import EventStream, merge, while_connected
from shoal.types.outputs import RequestOutput
from shoal.types.sampling_params import SamplingParams

Result = TypeVar("Result")

# Tokenizing a text this long takes milliseconds, in which no stream would get its tokens: a thread does it.
_LONG_TEXT = 16 * 1024

_encode = msgspec.json.Encoder().encode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What an answer's id is made of, when it was asked for, and how long it may be without progress.

    Of a request that a router keeps also: the seed where the body brings none, and the token ids of its prompts if a
    server has rendered them already.
    """

    request_id: str
    created: int
    deadline_seconds: float = DEFAULT_DEADLINE_SECONDS
    seed: int | None = None
    prompts: Sequence[list[int]] | None = None

    @classmethod
    def of(cls, request: Request) -> Origin:
        """A client's own request: its x-request-id, now. Raises InvalidRequestError for a bad x-shoal-deadline."""
        deadlines = request.headers.getlist(DEADLINE_HEADER)
        return cls(
            request_id=request.scope.get("shoal.request_id") or uuid.uuid4().hex,
            created=int(time.time()),
            deadline_seconds=read_deadline(", ".join(deadlines) if deadlines else None, DEFAULT_DEADLINE_SECONDS),
        )

    def seeded(self, params: SamplingParams) -> SamplingParams:
        return params if params.seed is not None or self.seed is None else params.clone(seed=self.seed)

    def rendered(self, num_prompts: int) -> Sequence[list[int] | None]:
        """The ids of each prompt where they are known. Raises InvalidRequestError for those of another request."""
        if self.prompts is None:
            return [None] * num_prompts
        if len(self.prompts) != num_prompts:
            raise InvalidRequestError(f"there are the ids of {len(self.prompts)} prompts; the body has {num_prompts}")
        return self.prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """A valid request that is not queued yet, and how its answer is shown: as chunks, or whole.

    prepared: one for each prompt.
    """

    prepared: list[PreparedRequest]
    streams: bool
    make_chunks: Callable[[], ChunkStream]
    make_whole: Callable[[Sequence[RequestOutput]], ChatCompletion | Completion]

    @property
    def num_answers(self) -> int:
        """Of each prompt."""
        return self.prepared[0].params.n


async def respond(request: Request, state: ServerState, generation: Generation) -> Response:
    """The answer to a client."""
    engine = state.engine
    if generation.streams:
        streams = [engine.stream(one) for one in generation.prepared]
        updates = streams[0] if len(streams) == 1 else merge(streams, generation.num_answers)
        return EventStream(updates, generation.make_chunks())
    outputs = await while_connected(request.receive, _collect_all(engine, generation.prepared))
    return json_response(generation.make_whole(outputs))


def stream_head(body: GenerationBody, shown_id: str, object: str, origin: Origin, model: str) -> StreamHead:
    return StreamHead(
        id=shown_id,
        object=object,
        created=origin.created,
        model=model,
        include_usage=body.include_usage,
        continuous_usage=body.continuous_usage,
        return_token_ids=bool(body.return_token_ids),
    )


async def off_the_loop(size: int, work: Callable[[], Result], *, always: bool = False) -> Result:
    """The result of `work`, from a thread when its text has too many characters for the event loop."""
    return await asyncio.to_thread(work) if always or size >= _LONG_TEXT else work()


async def _collect_all(engine: AsyncEngine, prepared: list[PreparedRequest]) -> list[RequestOutput]:
    """The whole answers to all prompts; if one fails, the others are ended too.

    Raises UnavailableError when the server ended an answer before it was whole.
    """
    if len(prepared) == 1:
        outputs = [await engine.collect(prepared[0])]
    else:
        tasks = [asyncio.create_task(engine.collect(one)) for one in prepared]
        try:
            outputs = list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    if any(answer.finish_reason == "abort" for output in outputs for answer in output.outputs):
        raise UnavailableError("the server shut down before the answer was whole; send the request elsewhere")
    return outputs


def encode_json(content: Any) -> bytes:
    return _encode(content)


def json_response(content: Any) -> Response:
    return Response(_encode(content), media_type="application/json")
