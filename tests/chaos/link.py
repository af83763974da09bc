"""A link between the router and a replica that the harness can break, and that shows which requests pass over it.

It forwards bytes and understands two things of them: that a piece which begins with POST begins a request, and the
marker in its body. So the harness knows whom a fault touches without knowing anything of the router.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time

MODES = ("open", "error", "hang", "half_event", "dropped", "reset")
_MARKER = re.compile(rb"chaos-[0-9a-f]{12}")
_MARKER_BYTES = 18
_ERROR = b'{"error":{"message":"a fault on purpose","type":"server_error","param":null,"code":null}}'
_ANSWER_500 = (
    b"HTTP/1.1 500 Internal Server Error\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_ERROR), _ERROR)
)


class _Connection:
    def __init__(self, writer: asyncio.StreamWriter, onward: asyncio.StreamWriter) -> None:
        self.writer, self.onward = writer, onward
        self.marker: str | None = None  # of the request that it carries
        self.tail = b""
        self.hanging = False  # its request was swallowed: nothing goes on here any more

    def close(self) -> None:
        for writer in (self.writer, self.onward):
            if (transport := writer.transport) is not None:
                transport.abort()


class Link:
    """Listens on a port of its own. mode: one of MODES; set it with `set_mode`."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._connections: set[_Connection] = set()
        self._open = asyncio.Event()
        self._open.set()
        self.mode = "open"
        self.num_struck = 0
        self.seen: dict[str, float] = {}  # the markers of all requests that came this way, and when they did last
        self.last_marker: str | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def close(self) -> None:
        self._server.close()
        self._open.set()
        while self._connections:
            for connection in list(self._connections):
                connection.close()
            await asyncio.sleep(0.005)

    def set_mode(self, mode: str) -> None:
        """open: forward. error: new requests get 500. hang: new ones are swallowed. half_event: what comes back is cut
        in its middle. dropped: nothing passes, nothing is closed. reset: all connections are closed, new ones too."""
        assert mode in MODES
        if self.mode in ("hang", "dropped") and mode == "open":
            # Bytes were lost on the way: what waits for them cannot be mended.
            for connection in list(self._connections):
                if connection.hanging or self.mode == "dropped":
                    connection.close()
        self.mode = mode
        if mode == "dropped":
            self._open.clear()
        else:
            self._open.set()
        if mode == "reset":
            self.num_struck += len(self._connections)
            for connection in list(self._connections):
                connection.close()

    @property
    def carried(self) -> set[str]:
        """The markers of the requests whose connections are open now."""
        return {connection.marker for connection in self._connections if connection.marker is not None}

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode == "reset":
            writer.transport.abort()
            return
        try:
            back, onward = await asyncio.open_connection("127.0.0.1", self._target_port, limit=1 << 20)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(writer, onward)
        self._connections.add(connection)
        pumps = [
            asyncio.ensure_future(self._forward(reader, connection)),
            asyncio.ensure_future(self._return(back, connection)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._connections.discard(connection)
            for pump in pumps:
                pump.cancel()
            connection.close()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                await self._open.wait()
                if data.startswith(b"POST "):
                    connection.tail, connection.marker = b"", None
                    if self.mode == "error":
                        self.num_struck += 1
                        self._note(connection, data)
                        connection.writer.write(_ANSWER_500)
                        await connection.writer.drain()
                        await asyncio.sleep(0.05)  # closed at once, the answer might be lost with the rest of the body
                        return
                    if self.mode == "hang":
                        self.num_struck += 1
                        connection.hanging = True
                elif data.startswith((b"GET ", b"HEAD ")):
                    connection.tail, connection.marker = b"", None
                self._note(connection, data)
                if not connection.hanging:
                    connection.onward.write(data)
                    await connection.onward.drain()

    def _note(self, connection: _Connection, data: bytes) -> None:
        searched = connection.tail + data
        if connection.marker is None and (found := _MARKER.search(searched)):
            connection.marker = self.last_marker = found[0].decode()
            self.seen[connection.marker] = time.monotonic()
        connection.tail = searched[-_MARKER_BYTES:]

    async def _return(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                await self._open.wait()
                if self.mode == "half_event" and connection.marker is not None:
                    self.num_struck += 1
                    connection.writer.write(data[: len(data) // 2])
                    await connection.writer.drain()
                    return
                connection.writer.write(data)
                await connection.writer.drain()
