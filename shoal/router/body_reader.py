"""BodyReader: a server's streamed answer, handed on within the event loop's own call for what the socket received.

Used by native.py and foreign.py. To wake a task for each piece costs more than all that is done with it; and when many
streams get a token at the same time, the first one would wait for the wake-ups of all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp

# What is left to do with a piece; its result: whether nothing more is wanted of the body.
Rest = Coroutine[Any, Any, bool]
# Takes a piece, without waiting. Returns None when that is done.
Take = Callable[[bytes], Rest | None]


class BodyReader(asyncio.Protocol):
    """Stands between a response's connection and aiohttp's protocol, while it is used as a context manager.

    aiohttp parses as ever, owns the connection, and bounds what is not read. Once it has taken in what was received,
    this takes the body's part of it out of its hands.
    """

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._content = response.content
        self._take: Take
        self._waiter: asyncio.Future[Rest | None] | None = None
        self._transport: asyncio.Transport | None = None
        connection = response.connection  # None where the whole body came with the head
        if connection is not None and connection.transport is not None:
            self._transport = connection.transport
            below = self._transport.get_protocol()
            assert isinstance(below, asyncio.Protocol)
            self._below = below
        self._has_ended = False
        self._content.on_eof(self._end)

    def __enter__(self) -> BodyReader:
        if self._transport is not None:
            self._transport.set_protocol(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._step_aside()

    async def read(self, take: Take) -> bool:
        """Hand on pieces as they come. Returns True when the rest of one says so, False at the end of the body.

        While a rest is done, nothing is handed on: aiohttp keeps what comes, within bounds. Raises what `take` raises,
        and aiohttp's errors of a connection that breaks.
        """
        content = self._content
        while True:
            # While the connection is not this one's (any more), aiohttp alone knows what comes.
            piece = content.read_nowait() if self._transport is not None else await content.readany()
            if piece:
                rest = take(piece)
            elif content.at_eof():
                return False
            else:
                rest = await self._wait(take)
            if rest is not None and await rest:
                return True

    async def _wait(self, take: Take) -> Rest | None:
        """Until a piece leaves something to do, or something has happened to the connection."""
        self._take = take
        waiter: asyncio.Future[Rest | None] = asyncio.get_running_loop().create_future()
        self._waiter = waiter
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                rest = waiter.result()
                if rest is not None:
                    rest.close()
            raise
        finally:
            self._waiter = None

    def _hand_on(self) -> None:
        """Something came, or the connection was lost."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        try:
            piece = self._content.read_nowait()
            rest = self._take(piece) if piece else None
        except Exception as error:
            waiter.set_exception(error)
            return
        if rest is not None or self._has_ended:
            waiter.set_result(rest)

    def _end(self) -> None:
        """The body has come to its end; only now aiohttp gives the connection to another request."""
        self._has_ended = True
        self._step_aside()

    def _step_aside(self) -> None:
        """Leave the connection as it was; once only, for it may be another request's afterwards."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.set_protocol(self._below)

    # --- asyncio.Protocol --------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._below.data_received(data)
        self._hand_on()

    def eof_received(self) -> bool | None:
        return self._below.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        self._below.connection_lost(error)
        self._hand_on()
        if self._waiter is not None and not self._waiter.done():  # aiohttp says nothing when it closed it for nonsense
            self._waiter.set_exception(aiohttp.ClientPayloadError("what came is no HTTP"))

    def pause_writing(self) -> None:
        self._below.pause_writing()

    def resume_writing(self) -> None:
        self._below.resume_writing()
