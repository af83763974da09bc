"""The client's side of a request, in plain ASGI: its headers and body in, an answer out. app.py and others use it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import time
import types
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, MutableMapping
from typing import Any

import msgspec

from shoal.errors import RequestTooLargeError, ShoalError
from shoal.protocol import sse
from shoal.protocol.errors import error_body, error_headers, status_of
from shoal.router.outcome import ClientGone

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_DISCARD_BYTES = 1024 * 1024
_DISCARD_SECONDS = 1.0

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def read_headers(scope: Scope) -> dict[str, str]:
    """By lower-case name; the values of a name that is there twice are joined by commas (RFC 9110, section 5.3)."""
    raw = scope["headers"]
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in raw}
    if len(headers) < len(raw):
        for name in headers:
            headers[name] = b", ".join(value for key, value in raw if key == name.encode("latin-1")).decode("latin-1")
    return headers


def request_id_of(headers: Mapping[str, str]) -> str:
    """The client's x-request-id where it sent a usable one, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


async def read_body(headers: Mapping[str, str], receive: Receive, max_bytes: int) -> bytes:
    """Raises RequestTooLargeError, or ClientGone."""
    announced = headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        await _discard(receive)
        raise _too_large(announced, max_bytes)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            if message.get("more_body", False):
                await _discard(receive)
            raise _too_large(f"more than {max_bytes}", max_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _discard(receive: Receive) -> None:
    """Read on for a moment: a connection that is closed while its client still sends is reset, and takes the answer
    with it."""
    num_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while num_bytes < _DISCARD_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def _too_large(found: str, max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"the body has {found} bytes; this router takes up to {max_bytes} (--max-request-bytes)"
    )


async def while_connected(receive: Receive, task: asyncio.Future[None]) -> None:
    """Until `task` is done; it is cancelled when the client disconnects: ClientGone then.

    receive: after the whole body was read, the next message can only be the disconnect.
    """
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ShoalError, ClientGone):
                await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Answer:
    """What one client gets. status: 0 until something was sent, at started_at. stream_error: status and error object of
    an event that ended a stream.

    Waiting in `data` is the back-pressure of slow clients.
    """

    def __init__(self, send: Send, request_id: str) -> None:
        self.status = 0
        self.started_at = 0.0
        self.request_id = request_id
        self.stream_error: tuple[int, bytes] | None = None
        self._send = send

    @property
    def outcome(self) -> int:
        """The status that tells how it ended: of a stream that ended with an error the error's."""
        return self.status if self.stream_error is None else self.stream_error[0]

    @property
    def started(self) -> bool:
        return self.status != 0

    async def whole(
        self, status: int, body: bytes, media_type: str = "application/json", headers: Mapping[str, str] | None = None
    ) -> None:
        """All of an answer at once."""
        fields = {"content-type": media_type, "content-length": str(len(body)), **(headers or {})}
        await self.start(status, fields)
        await self._send({"type": "http.response.body", "body": body})

    async def json(self, content: Any, status: int = 200) -> None:
        await self.whole(status, msgspec.json.encode(content))

    async def error(self, error: ShoalError) -> None:
        """As an answer, or as an event where a stream has begun, which ends without [DONE] then."""
        body = error_body(error).encode()
        status = status_of(error)
        await self.failure(status, body, error_headers(status, getattr(error, "retry_after", None)))

    async def failure(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """As `error`, of an error object that somebody else wrote."""
        if self.started:
            self.stream_error = (status, body)
            await self.end(sse.PREFIX + body.strip().replace(b"\n", b" ") + sse.END)
        else:
            await self.whole(status, body, headers=headers)

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        raw.append((b"x-request-id", self.request_id.encode("latin-1")))
        self.status = status
        self.started_at = time.monotonic()
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def data(self, data: bytes) -> None:
        """A piece of a stream of events, which begins with the first one."""
        if not self.status:
            await self.start(200, {"content-type": sse.MEDIA_TYPE, **sse.HEADERS})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    def begin_data(self, data: bytes) -> Callable[[], Awaitable[None]] | None:
        """As `data`, from outside of a task. Returns None when it is sent, else what a task has to call and await."""
        if not self.status:
            return functools.partial(self.data, data)
        sending = self._send({"type": "http.response.body", "body": data, "more_body": True})
        if type(sending) is not types.CoroutineType:
            return lambda: sending
        try:
            waits_for = sending.send(None)
        except StopIteration:
            return None
        return functools.partial(_go_on, sending, waits_for)

    async def end(self, data: bytes = b"") -> None:
        """The last piece."""
        if not self.status:
            await self.start(200, {"content-type": sse.MEDIA_TYPE, **sse.HEADERS})
        await self._send({"type": "http.response.body", "body": data})


@types.coroutine
def _go_on(sending: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """Await what was begun outside of a task and has come to where it waits for something."""
    try:
        while True:
            try:
                result = yield waits_for
            except BaseException as error:
                waits_for = sending.throw(error)
            else:
                waits_for = sending.send(result)
    except StopIteration:
        return
