"""Servers without sockets: the real app over a core without a model, called as ASGI; and the router's part."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import functools
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from shoal.config.options import ModelOptions, ServerOptions
from shoal.engine.async_engine import AsyncEngine
from shoal.engine.tokenizer import Tokenizer
from shoal.messages import TokenDelta
from shoal.protocol.internal import (
    PATH,
    REQUEST_MEDIA_TYPE,
    VERSION,
    Accepted,
    AnswerJournal,
    ContinueRequest,
    Failed,
    Finished,
    FrameReader,
    InternalEvent,
    Progress,
    encode_request,
)
from shoal.server.app import create_app
from tests.engine.fake_client import FakeClient, Script, _Running, counting, make_config
from tests.engine.tokenizers_for_tests import CHAT_TEMPLATE, hugging_face


@functools.cache
def chatting(kind: str) -> Tokenizer:
    """Any of the tokenizers, with a chat template."""
    backend = copy.deepcopy(hugging_face(kind))
    backend.chat_template = CHAT_TEMPLATE
    return Tokenizer(backend)


class CachingClient(FakeClient):
    """Says that half of what it was sent came from the prefix cache."""

    def _step(self, running: _Running) -> TokenDelta:
        sent = running.request.emitted_token_ids
        first = running.num_emitted == len(sent)
        delta = super()._step(running)
        if first:
            delta.num_cached_tokens = (len(running.request.prompt_token_ids) + len(sent)) // 2
        return delta


@dataclasses.dataclass
class Reply:
    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def events(self) -> list[InternalEvent]:
        return list(FrameReader().feed(self.data))

    @property
    def error(self) -> dict[str, Any]:
        return dict(json.loads(self.data)["error"])


class InProcessServer:
    def __init__(self, core: FakeClient, engine: AsyncEngine, app: Any) -> None:
        self.core = core
        self.engine = engine
        self.app = app

    async def call(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        until: Callable[[bytes], bool] = lambda data: False,
        hold: asyncio.Event | None = None,
    ) -> Reply:
        """Post and read. until: the reader goes away when this is true of what came. hold: while it is not set, the
        reader takes nothing more."""
        reply = Reply(0, {}, b"")
        gone = asyncio.Event()
        bodies = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if bodies:
                return bodies.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
                return
            if not gone.is_set():
                reply.data += message.get("body", b"")
            if until(reply.data):
                gone.set()
            if hold is not None:
                await hold.wait()

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        await self.app(scope, receive, send)
        return reply

    async def post(self, path: str, body: Mapping[str, Any], request_id: str = "r") -> Reply:
        """As a client does."""
        headers = {"content-type": "application/json", "x-request-id": request_id}
        return await self.call(path, json.dumps(body).encode(), headers)

    async def go_on(self, request: ContinueRequest, **options: Any) -> Reply:
        """As a router does."""
        return await self.call(PATH, encode_request(request), {"content-type": REQUEST_MEDIA_TYPE}, **options)

    def idle(self) -> bool:
        return not self.core.running and self.engine.num_unfinished == 0

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def in_process_server(
    script: Script = counting,
    *,
    tokens_per_step: int = 1,
    kind: str = "byte_level",
    engine: Mapping[str, Any] | None = None,
    secret: str | None = None,
    **options: Any,
) -> AsyncIterator[InProcessServer]:
    """kind: of the tokenizer. secret: of /internal/…. options: of ServerOptions."""
    config = make_config()
    core = CachingClient(config, script, tokens_per_step)
    running = AsyncEngine(core, config, chatting(kind), **(engine or {}))
    await running.start()
    settings = ServerOptions(**{"served_model_name": ["tiny"], "disable_log_requests": True, **options})
    try:
        app = create_app(running, settings, ModelOptions(model="tiny"), internal_secret=secret)
        yield InProcessServer(core, running, app)
    finally:
        await running.close()
        assert running.num_unfinished == 0


def first_request(path: str, body: Mapping[str, Any], **fields: Any) -> ContinueRequest:
    """What a router sends first."""
    values = {"version": VERSION, "request_id": "r", "seed": 7, "created": 1234, **fields}
    return ContinueRequest(path=path, body=json.dumps(body).encode(), **values)


@dataclasses.dataclass
class Journal:
    """What a router keeps of a request, and what it has passed on."""

    request: ContinueRequest
    data: bytes = b""
    num_frames: int = 0
    end: Finished | Failed | None = None

    def read(self, data: bytes) -> None:
        """Take the whole frames of what came; what is left of one was not delivered."""
        answers = {answer.index: answer for answer in self.request.answers}
        for event in FrameReader().feed(data):
            self.num_frames += 1
            match event:
                case Accepted(prompts):
                    assert self.request.prompts in (None, prompts)
                    self.request.prompts = prompts
                case Progress(index):
                    answers.setdefault(index, AnswerJournal(index=index)).add(event)
                    self.data += event.data
                case Finished(end):
                    self.data += end
                    self.end = event
                case Failed():
                    self.end = event
        self.request.answers = list(answers.values())
