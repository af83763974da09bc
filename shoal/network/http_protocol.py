"""HTTP/1.1 of our servers: uvicorn's protocol on httptools, with a bound on a request's head. http_server.py uses it.

The parser has no limits of its own: what it keeps of a header, a target or a trailer grows until that has ended.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from shoal.protocol.errors import ErrorBody, ErrorDetail, error_type

# Of a request's target, headers and trailers in all.
MAX_HEAD_BYTES = 64 * 1024
# Each header counts so much more, as in HTTP/2 (RFC 9113, section 6.5.2): many small ones take memory, too.
_HEADER_BYTES = 32
# A connection that is closed while its client still sends is reset, and takes the answer with it: so much, and for so
# long, is read and forgotten first.
_LAST_BYTES = 1024 * 1024
_LAST_SECONDS = 1.0


class _HeadTooLargeError(Exception):
    """Ends the parsing; the parser makes an error of its own of it."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Answers 431 to a head of more than MAX_HEAD_BYTES, and closes the connection."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_bytes = 0
        # Read since the parser last handed something on: what it keeps for now.
        self._kept_bytes = 0
        self._is_refused = False
        self._forgotten_bytes = 0

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            self._forgotten_bytes += len(data)
            if self._forgotten_bytes > _LAST_BYTES:
                self.transport.close()
            return
        self._kept_bytes += len(data)
        super().data_received(data)
        # What came in the same read as something that was handed on is not counted: less than a read.
        if self._kept_bytes > MAX_HEAD_BYTES and not self._is_refused:
            self._refuse()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for all that the parser refuses."""
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse()
        else:
            super().send_400_response(msg)

    def _refuse(self) -> None:
        self._is_refused = True
        self.logger.warning("a request from %s has a head of more than %d bytes", self.client, MAX_HEAD_BYTES)
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()  # an answer is under way on this connection: nothing can be put between
            return
        message = f"the request's target and headers take more than {MAX_HEAD_BYTES} bytes"
        body = ErrorBody(ErrorDetail(message, error_type(431), None, "headers_too_large")).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[431] + head + body)
        self.loop.call_later(_LAST_SECONDS, self.transport.close)

    def _count(self, num_bytes: int) -> None:
        self._kept_bytes = 0
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            raise _HeadTooLargeError

    # --- what the parser hands on ------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._head_bytes = self._kept_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + _HEADER_BYTES)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._kept_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._kept_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._kept_bytes = 0
        super().on_message_complete()
