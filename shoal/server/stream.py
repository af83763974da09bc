"""EventStream: the ASGI response of a streamed answer; and how work ends when its client goes away.

No response class of Starlette is used here: this path is walked for every token.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoal.errors import EngineDeadError, EngineError, ShoalError, UnavailableError
from shoal.log import get_logger
from shoal.protocol import sse
from shoal.protocol.chunks import ChunkStream
from shoal.protocol.errors import ErrorBody, ErrorDetail, error_body
from shoal.types.outputs import FinishReason, RequestUpdate

Result = TypeVar("Result")

logger = get_logger(__name__)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client disconnects. Raises ClientDisconnect then.

    receive: after the whole body was read, the next message can only be the disconnect.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ShoalError):
                await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def failure_of(update: RequestUpdate) -> ShoalError | None:
    """The error that ended this answer, if one did."""
    if update.finish_reason is FinishReason.ERROR:
        message = update.error or "the engine failed on this request"
        return EngineDeadError(message) if update.lost else EngineError(message)
    if update.finish_reason is FinishReason.ABORT:
        return UnavailableError(update.error or "the answer was ended before it was whole")
    return None


class EventStream(Response):
    """Sends a stream of updates as server-sent events.

    The response starts with the first event, so what fails before it gets a status of its own. What fails later is
    told by an error event, after which the stream ends without [DONE].
    """

    def __init__(self, updates: AsyncGenerator[RequestUpdate, None], chunks: ChunkStream) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({**sse.HEADERS, "content-type": sse.MEDIA_TYPE})
        self._updates = updates
        self._chunks = chunks
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._run(send))

    async def _run(self, send: Send) -> None:
        try:
            await self._send_all(send)
        except ShoalError as error:
            if not self._started:
                raise
            await self._end(send, error_body(error))
        except Exception:
            if not self._started:
                raise
            logger.exception("a stream failed")
            await self._end(send, ErrorBody(ErrorDetail("internal error of the server", "server_error")))
        else:
            await send({"type": "http.response.body", "body": self._chunks.finish()})

    async def _send_all(self, send: Send) -> None:
        render = self._chunks.render
        async with contextlib.aclosing(self._updates) as updates:
            async for update in updates:
                data = render(update)
                if data:
                    if not self._started:
                        await self._start(send)
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                if update.finish_reason is not None and (failure := failure_of(update)) is not None:
                    raise failure
        if not self._started:
            await self._start(send)

    async def _start(self, send: Send) -> None:
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _end(self, send: Send, error: ErrorBody) -> None:
        await send({"type": "http.response.body", "body": sse.event(error)})


async def merge(
    streams: list[AsyncGenerator[RequestUpdate, None]], num_answers: int
) -> AsyncGenerator[RequestUpdate, None]:
    """The updates of several streams as they come. Closing it closes them all.

    Answer i of stream p becomes answer p * num_answers + i.
    """
    # Bounded: while the client is slow, the engine joins an answer's news into one update.
    queue: asyncio.Queue[RequestUpdate | Exception | None] = asyncio.Queue(2 * len(streams))

    async def forward(stream: AsyncGenerator[RequestUpdate, None], first_index: int) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for update in stream:
                    update.index += first_index
                    await queue.put(update)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(forward(stream, p * num_answers)) for p, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            news = await queue.get()
            if isinstance(news, Exception):
                raise news
            if news is None:
                num_open -= 1
            else:
                yield news
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
