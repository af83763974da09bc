"""Reads a request's body: bounded, whatever the client says of its length, and checked against a model."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request

from shoal.errors import RequestTooLargeError
from shoal.protocol.media_type import check_json
from shoal.protocol.parsing import Body, parse_body


async def read_body(request: Request, kind: type[Body], max_bytes: int) -> Body:
    """Raises UnsupportedMediaTypeError, RequestTooLargeError, InvalidRequestError or ClientDisconnect."""
    check_json(request.headers.get("content-type"))
    return parse_body(kind, await read_bytes(request, max_bytes))


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """Raises RequestTooLargeError or ClientDisconnect."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(announced, max_bytes)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise _too_large(f"more than {max_bytes}", max_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def check_size(num_bytes: int, max_bytes: int) -> None:
    """Raise RequestTooLargeError for a body of too many bytes that came within another one."""
    if num_bytes > max_bytes:
        raise _too_large(str(num_bytes), max_bytes)


def _too_large(found: str, max_bytes: int) -> RequestTooLargeError:
    return RequestTooLargeError(
        f"the body has {found} bytes; this server takes up to {max_bytes} (--max-request-bytes)"
    )
