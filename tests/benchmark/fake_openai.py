"""A server on the test's own loop that streams what the test says, and counts who asks at a time."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any


def chunk(text: str, completion_tokens: int | None = None, finish_reason: str | None = None) -> bytes:
    usage = None if completion_tokens is None else {"prompt_tokens": 5, "completion_tokens": completion_tokens}
    return event({"choices": [{"text": text, "finish_reason": finish_reason}], "usage": usage})


def usage(prompt_tokens: int, completion_tokens: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}})


def event(content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
ANSWER = chunk("a") + chunk("b") + chunk("c", finish_reason="length") + usage(7, 3) + DONE


class FakeOpenAI:
    """`answer` gives status and body for (path, body). `gate`: nobody is answered before so many are here."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.answer: Callable[[str, dict[str, Any]], tuple[int, bytes]] = lambda path, body: (200, ANSWER)
        self.gate = 0
        self.num_running = 0
        self.most_running = 0
        self._open = asyncio.Event()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                await self._respond(head[0].split()[1], headers, body, writer)
        writer.close()

    async def _respond(self, path: str, headers: dict[str, str], body: Any, writer: asyncio.StreamWriter) -> None:
        self.requests.append((path, headers, body))
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        if self.num_running >= self.gate:
            self._open.set()
        try:
            await self._open.wait()
            await asyncio.sleep(0.005)  # long enough for one too many to be seen
            status, content = self.answer(path, body)
        finally:
            self.num_running -= 1
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()


@contextlib.asynccontextmanager
async def fake_openai() -> AsyncIterator[FakeOpenAI]:
    fake = FakeOpenAI()
    server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.close()
