"""What chat and completions have in common on their way through the engine. Used by chat.py and completions.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response

from shoal.engine.async_engine import AsyncEngine
from shoal.engine.prepare import PreparedRequest
from shoal.errors import UnavailableError
from shoal.protocol.chunks import StreamHead
from shoal.protocol.fields import GenerationBody
from shoal.types.outputs import RequestOutput

Result = TypeVar("Result")

# Tokenizing a text this long takes milliseconds, in which no stream would get its tokens: a thread does it.
_LONG_TEXT = 16 * 1024

_encode = msgspec.json.Encoder().encode


def stream_head(body: GenerationBody, id: str, object: str, model: str) -> StreamHead:
    return StreamHead(
        id=id,
        object=object,
        created=int(time.time()),
        model=model,
        include_usage=body.include_usage,
        continuous_usage=body.continuous_usage,
        return_token_ids=bool(body.return_token_ids),
    )


async def off_the_loop(size: int, work: Callable[[], Result], *, always: bool = False) -> Result:
    """The result of `work`, from a thread when its text has too many characters for the event loop."""
    return await asyncio.to_thread(work) if always or size >= _LONG_TEXT else work()


async def collect_all(engine: AsyncEngine, prepared: list[PreparedRequest]) -> list[RequestOutput]:
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


def json_response(content: Any) -> Response:
    return Response(_encode(content), media_type="application/json")
