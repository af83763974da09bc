"""FrameStream: the ASGI response of /internal/v1/continue. Made by internal.py; walked for every token.

The same Generation that a client is answered with is sent in frames here, so that whoever reads them can let another
server go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoal.engine.async_engine import AsyncEngine
from shoal.engine.request_output import OutputBuilder
from shoal.engine.streams import RequestStream
from shoal.errors import EngineDeadError, ShoalError, UnavailableError
from shoal.log import get_logger
from shoal.protocol import internal
from shoal.protocol.errors import ErrorBody, ErrorDetail, error_body, status_of
from shoal.protocol.internal import Accepted, Beat, Failed, Finished, InternalEvent, Progress, frame
from shoal.protocol.responses import Usage
from shoal.server.generation import Generation, encode_json
from shoal.server.stream import failure_of, merge, while_connected
from shoal.types.outputs import RequestUpdate

logger = get_logger(__name__)

# How soon it is told that a request that waited runs.
_TURN_SECONDS = 0.05

_HEADERS = {"content-type": internal.STREAM_MEDIA_TYPE, "cache-control": "no-cache", "x-accel-buffering": "no"}


class FrameStream(Response):
    """Queues the request and sends frames. What fails before it is queued gets a status of its own.

    A reader who goes away ends the request in the engine. While a reader is slow, the engine joins an answer's news
    into one update, and no beat is sent.
    """

    def __init__(self, engine: AsyncEngine, generation: Generation) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(_HEADERS)
        self._engine = engine
        self._generation = generation
        self._num_writing = 0
        self._last_written = 0.0
        self._was_running = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._run(send))

    async def _run(self, send: Send) -> None:
        self._send = send
        async with contextlib.AsyncExitStack() as queued:
            prepared = self._generation.prepared
            streams = [await queued.enter_async_context(self._engine.running(one)) for one in prepared]
            streaming = self._generation.streams
            rendering = _as_chunks(self._generation) if streaming else _as_a_whole(self._generation, self._engine)
            _replay(streams, self._generation.num_answers, rendering)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            last = await self._send_all(streams, rendering)
        await send({"type": "http.response.body", "body": frame(last)})

    async def _send_all(self, streams: Sequence[RequestStream], rendering: _Rendering) -> InternalEvent:
        """Everything but the last frame, which is returned."""
        first = self._generation.prepared[0].params
        prompts = [one.prompt_token_ids for one in self._generation.prepared]
        self._was_running = _is_running(streams)
        beats = asyncio.create_task(self._beat(streams))
        try:
            await self._write(frame(Accepted(prompts, first.n, first.max_tokens or 0, self._was_running)))
            await self._send_news(streams, rendering)
            return rendering.finish()
        except ShoalError as error:
            lost, moved = isinstance(error, EngineDeadError), isinstance(error, UnavailableError)
            crashed = lost and any(stream.num_crashes > stream.request.num_crashes for stream in streams)
            return Failed(status_of(error), error_body(error).encode(), lost=lost, crashed=crashed, moved=moved)
        except Exception:
            logger.exception("a stream of frames failed")
            return Failed(500, ErrorBody(ErrorDetail("internal error of the server", "server_error")).encode())
        finally:
            beats.cancel()
            await asyncio.gather(beats, return_exceptions=True)  # nothing may come after the last frame

    async def _send_news(self, streams: Sequence[RequestStream], rendering: _Rendering) -> None:
        """Raises what ended an answer before it was whole, after all news that came with it."""
        add = rendering.add
        async with contextlib.aclosing(_news(streams, self._generation.num_answers)) as news:
            async for updates in news:
                failure: ShoalError | None = None
                frames = b""
                for update in updates:
                    if update.finish_reason is not None and (found := failure_of(update)) is not None:
                        failure = failure or found
                        update.finish_reason = update.error = None
                        if not (update.token_ids or update.text or update.prompt_logprobs):
                            continue
                    data = add(update)
                    progress = Progress(
                        update.index, data, update.token_ids, len(update.text), update.logprobs,
                        update.prompt_logprobs, update.num_cached_tokens, update.finish_reason, update.stop_reason,
                    )  # fmt: skip
                    frames += frame(progress)
                if frames:
                    await self._write(frames)
                if failure is not None:
                    raise failure

    async def _write(self, data: bytes) -> None:
        self._num_writing += 1
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._num_writing -= 1
        self._last_written = time.monotonic()

    async def _beat(self, streams: Sequence[RequestStream]) -> None:
        """Say that the server is there whenever nothing else was said for a while, or when the request's turn came."""
        while True:
            running = _is_running(streams)
            left = self._last_written + internal.BEAT_SECONDS - time.monotonic()
            if self._num_writing or (left > 0 and running == self._was_running):
                pause = left if left > 0 else internal.BEAT_SECONDS
                await asyncio.sleep(pause if running else min(pause, _TURN_SECONDS))
            else:
                self._was_running = running
                beat = Beat(seconds_without_progress(self._engine), self._engine.restarting, running)
                await self._write(frame(beat))


def _is_running(streams: Sequence[RequestStream]) -> bool:
    """Whether something of the request is in an engine core, or has been answered."""
    return any(answer.engine_id is not None or not answer.open for stream in streams for answer in stream.answers)


def seconds_without_progress(engine: AsyncEngine) -> float:
    """Of the replica that made no step for the longest time although it has work."""
    return max((one.seconds_without_progress for one in engine.replicas if one.failure is None), default=0.0)


@dataclasses.dataclass(frozen=True, slots=True)
class _Rendering:
    """How the news become what the client gets.

    add: the bytes for the client that go with an update. finish: the end of a request that went well.
    """

    add: Callable[[RequestUpdate], bytes]
    finish: Callable[[], Finished]


def _as_chunks(generation: Generation) -> _Rendering:
    chunks = generation.make_chunks()
    return _Rendering(chunks.render, lambda: _finished(chunks.finish(), chunks.usage()))


def _as_a_whole(generation: Generation, engine: AsyncEngine) -> _Rendering:
    builders = [OutputBuilder(one, engine.tokenizer) for one in generation.prepared]

    def add(update: RequestUpdate) -> bytes:
        prompt, index = divmod(update.index, generation.num_answers)
        builders[prompt].add(update if index == update.index else msgspec.structs.replace(update, index=index))
        return b""

    def finish() -> Finished:
        whole = generation.make_whole([builder.build() for builder in builders])
        return _finished(encode_json(whole), whole.usage)

    return _Rendering(add, finish)


def _finished(data: bytes, usage: Usage) -> Finished:
    return Finished(data, usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens_details.cached_tokens)


def _replay(streams: Sequence[RequestStream], num_answers: int, rendering: _Rendering) -> None:
    """Bring the renderer to where it was when the request left another server; what it says the client has."""
    for prompt, stream in enumerate(streams):
        for update in stream.take_replayed():
            update.index += prompt * num_answers
            rendering.add(update)


async def _news(streams: Sequence[RequestStream], num_answers: int) -> AsyncGenerator[Sequence[RequestUpdate], None]:
    """The news of all prompts as they come: of one prompt all that there are at a time."""
    if len(streams) == 1:
        while updates := await streams[0].next_updates():
            yield updates
        return
    async with contextlib.aclosing(merge([_each(stream) for stream in streams], num_answers)) as merged:
        async for update in merged:
            yield [update]


async def _each(stream: RequestStream) -> AsyncGenerator[RequestUpdate, None]:
    while updates := await stream.next_updates():
        for update in updates:
            yield update
