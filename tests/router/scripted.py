"""Servers of a few lines, on the test's own event loop and on real sockets, that do to each request what a test says.

Every answer counts up: token i of a text is " i", so a token that is missing or comes twice is seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from uvicorn.server import ServerState

from shoal.network import listen, port_of
from shoal.network.http_server import http_config
from shoal.protocol import internal
from shoal.protocol.internal import Accepted, Beat, ContinueRequest, Failed, Finished, Progress
from shoal.types.outputs import FinishReason

PROMPT_IDS = [7, 8, 9]
ERROR = {"error": {"message": "on purpose", "type": "server_error", "param": None, "code": None}}


class Cut(Exception):
    """Raised in the app: uvicorn closes the connection in the middle of the answer."""


@dataclasses.dataclass
class Act:
    """What to do with one request. after: tokens that are answered first.

    how: "cut" the connection, "half" an event and cut, "lost" and "moved" (frames), "silent", "stalled" (beats that say
    so), "hang" (no answer at all), "error" (an event or frame that ends it), "end" (no end mark), "before usage" (cut).
    status: answer this instead of anything.
    """

    how: str = ""
    after: int = 0
    status: int = 200
    body: dict[str, Any] = dataclasses.field(default_factory=lambda: ERROR)
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


class ScriptedServer:
    """acts: what is done to the next requests, in order; those after them are answered well."""

    def __init__(self, native: bool = True, models: tuple[str, ...] = ("m",), golden: str = "right") -> None:
        self.native = native
        self.models = models
        self.golden = golden
        self.acts: list[Act] = []
        self.pause = 0.0
        self.padding = ""
        self.health = 200
        self.ready = 200
        self.requests: list[Any] = []  # ContinueRequest, or the JSON of a request
        self.headers: list[dict[str, str]] = []
        self.num_golden = 0
        self.num_open = 0
        self.num_sent = 0
        self.disconnected = asyncio.Event()
        self.started = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.url = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = scope["path"]
        if path == "/version":
            await _json(send, {"version": "0", **({"internal": [internal.CAPABILITY]} if self.native else {})})
        elif path == internal.PATH and scope["method"] == "GET":
            await _json(send, ERROR, 405)
        elif path == "/v1/models":
            await _json(send, {"data": [{"id": name, "max_model_len": 64} for name in self.models]})
        elif path in ("/health", "/readyz", "/livez"):
            status = {"/health": self.health, "/readyz": self.ready, "/livez": 200}[path]
            await _json(send, {"status": "ok"} if status == 200 else ERROR, status)
        elif path == "/v1/completions" and json.loads(body).get("prompt") == "golden?":
            self.num_golden += 1
            await _json(send, {"choices": [{"index": 0, "text": self.golden, "finish_reason": "length"}]})
        else:
            await self._work(scope, receive, send, body)

    async def _work(self, scope: Any, receive: Any, send: Any, body: bytes) -> None:
        act = self.acts.pop(0) if self.acts else Act()
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        is_frames = scope["path"] == internal.PATH
        self.requests.append(internal.decode_request(body) if is_frames else json.loads(body or b"{}"))
        self.num_open += 1
        self.started.set()
        watch = asyncio.ensure_future(self._watch(receive))
        work = asyncio.ensure_future(self._answer(scope["path"], send, act, self.requests[-1]))
        try:
            await asyncio.wait((watch, work), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self.num_open -= 1
            for task in (watch, work):
                task.cancel()
            await asyncio.gather(watch, work, return_exceptions=True)

    async def _watch(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.disconnected.set()

    async def _answer(self, path: str, send: Any, act: Act, request: Any) -> None:
        if act.how == "hang":
            await asyncio.Event().wait()
        if act.status != 200:
            await _json(send, act.body, act.status, act.headers)
        elif isinstance(request, ContinueRequest):
            await self._frames(send, act, request)
        elif path not in ("/v1/completions", "/v1/chat/completions"):
            await _json(send, {"path": path, "body": request})
        elif request.get("stream"):
            await self._events(send, act, request, path == "/v1/chat/completions")
        else:
            await self._plain(send, act, request, path == "/v1/chat/completions")

    async def _send(self, send: Any, data: bytes) -> None:
        await self.gate.wait()
        await asyncio.sleep(self.pause)  # gives way to others in any case
        self.num_sent += 1
        await send({"type": "http.response.body", "body": data, "more_body": True})

    # --- frames --------------------------------------------------------------------------------------------------

    async def _frames(self, send: Any, act: Act, request: ContinueRequest) -> None:
        fields = json.loads(request.body)
        total = fields.get("max_tokens", 5)
        stream = fields.get("stream", False)
        done = len(request.answers[0].token_ids) if request.answers else 0
        await _start(send, internal.STREAM_MEDIA_TYPE)
        frame = internal.frame
        await self._send(send, frame(Accepted(prompts=[PROMPT_IDS], max_tokens=total)))
        for number in range(done, total):
            if number - done == act.after and act.how:
                await self._end_frames(send, act, number)
            reason = FinishReason.LENGTH if number == total - 1 else None
            text = f" {number}"
            data = _chunk(text + self.padding, reason) if stream else b""
            news = Progress(index=0, data=data, token_ids=[number], num_characters=len(text), finish_reason=reason)
            await self._send(send, frame(news))
        whole = {"choices": [{"text": _text(0, total)}], "usage": {"completion_tokens": total}}
        end = b"data: [DONE]\n\n" if stream else json.dumps(whole).encode()
        await self._send(send, frame(Finished(data=end, num_prompt_tokens=3, num_tokens=total)))
        await send({"type": "http.response.body", "body": b""})

    async def _end_frames(self, send: Any, act: Act, number: int) -> None:
        frame = internal.frame
        match act.how:
            case "half":
                news = frame(Progress(index=0, data=_chunk(f" {number}", None), token_ids=[number]))
                await self._send(send, news[: len(news) // 2])
                await asyncio.sleep(0.02)
            case "lost" | "moved" | "error":
                body = json.dumps(ERROR).encode()
                await self._send(
                    send,
                    frame(
                        Failed(503, body, lost=act.how == "lost", crashed=act.how == "lost", moved=act.how == "moved")
                    ),
                )
                await asyncio.sleep(5)
            case "silent":
                await asyncio.Event().wait()
            case "stalled":
                for seconds in (0.1, 100.0):
                    await self._send(send, frame(Beat(seconds_without_progress=seconds)))
                await asyncio.Event().wait()
            case "beats":
                while True:
                    await self._send(send, frame(Beat()))
                    await asyncio.sleep(0.02)
            case "garbage":
                await self._send(send, b"\x00\x00\x00\x03abc")
                await asyncio.sleep(5)
        await asyncio.sleep(0.01)
        raise Cut

    # --- the OpenAI API ------------------------------------------------------------------------------------------

    async def _events(self, send: Any, act: Act, request: dict[str, Any], chat: bool) -> None:
        first = _count(request, chat)
        await _start(send, "text/event-stream")
        name = f"{self.url[-4:]}"
        if chat:
            await self._send(
                send, _event({"id": name, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            )
        total = request.get("max_tokens", 5)
        for number in range(first, first + total):
            if number - first == act.after and act.how:
                match act.how:
                    case "half":
                        await self._send(send, _event({"id": name, "choices": []})[:9])
                        await asyncio.sleep(0.02)
                    case "error":
                        await self._send(send, _event(act.body))
                        await send({"type": "http.response.body", "body": b""})
                        return
                    case "end":
                        await send({"type": "http.response.body", "body": b""})
                        return
                    case "silent":
                        await asyncio.Event().wait()
                await asyncio.sleep(0.01)
                raise Cut
            reason = "length" if number == first + total - 1 else None
            text = f" {number}"
            choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
            choice |= {"delta": {"content": text}} if chat else {"text": text}
            await self._send(send, _event({"id": name, "choices": [choice]}))
        if act.how == "before usage":
            raise Cut
        if (request.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 3 + first, "completion_tokens": total, "total_tokens": 3 + first + total}
            await self._send(send, _event({"id": name, "choices": [], "usage": usage}))
        await self._send(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b""})

    async def _plain(self, send: Any, act: Act, request: dict[str, Any], chat: bool) -> None:
        if act.how:
            await _start(send, "application/json")
            await self._send(send, b'{"choices"')
            raise Cut
        text = _text(0, request.get("max_tokens", 5))
        choice: dict[str, Any] = {"message": {"content": text}} if chat else {"text": text}
        await _json(send, {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 5}})


def _count(request: dict[str, Any], chat: bool) -> int:
    """How many numbers the prompt ends with: where this answer begins."""
    if not chat:
        return request["prompt"].count(" ")
    last = request["messages"][-1]
    return last["content"].count(" ") if request.get("continue_final_message") else 0


def _text(first: int, end: int) -> str:
    return "".join(f" {number}" for number in range(first, end))


def _chunk(text: str, reason: FinishReason | None) -> bytes:
    return _event({"choices": [{"index": 0, "text": text, "finish_reason": reason and str(reason)}]})


def _event(content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


async def _start(send: Any, media_type: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
    fields = {"content-type": media_type, **(headers or {})}
    raw = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def _json(send: Any, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
    await _start(send, "application/json", status, headers)
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


@contextlib.asynccontextmanager
async def served(app: Any, port: int = 0) -> AsyncIterator[str]:
    """An ASGI app on a socket of this machine; its URL. Its end is sudden: all connections break."""
    listener = listen("127.0.0.1", port)
    config, state = http_config(app), ServerState()
    config.load()
    protocol: Any = config.http_protocol_class
    server = await asyncio.get_running_loop().create_server(
        lambda: protocol(config=config, server_state=state, app_state={}), sock=listener
    )
    try:
        yield f"http://127.0.0.1:{port_of(listener)}"
    finally:
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        tasks = list(state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Callable[[], bool], what: str = "") -> None:
    """Until it holds; fails after a time that is only reached when it never will."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)
