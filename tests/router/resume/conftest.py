from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from shoal.config.router_settings import BackendSpec
from shoal.network import free_port
from shoal.router.app import RouterApp
from shoal.router.core import Router
from tests.router.conftest import settings_for
from tests.router.scripted import ScriptedServer, served, until


class Received:
    """What a client has of a stream: events count when the id that ends them is there. Bytes may be cut anywhere."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.ids: list[str] = []
        self.done = False
        self._held: list[Any] = []
        self._rest = b""

    @property
    def last_id(self) -> str | None:
        return self.ids[-1] if self.ids else None

    def feed(self, data: bytes) -> None:
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            assert not self.done, "nothing comes after the end"
            lines = dict(line.split(": ", 1) for line in event.decode().split("\n"))
            assert set(lines) <= {"data", "id"}, event
            if lines["data"] == "[DONE]":
                self.done = True
                self.events += self._held
                continue
            self._held.append(json.loads(lines["data"]))
            if "id" in lines:
                self.events += self._held
                self._held = []
                self.ids.append(lines["id"])

    def cut(self) -> None:
        """The connection is gone."""
        self._held, self._rest = [], b""

    @property
    def error(self) -> dict[str, Any] | None:
        """The one that the stream ended with."""
        return self._held[-1]["error"] if self._held and "error" in self._held[-1] else None

    @property
    def text(self) -> str:
        texts = []
        for event in self.events:
            texts += [one.get("text") or one.get("delta", {}).get("content") or "" for one in event["choices"]]
        return "".join(texts)


@dataclasses.dataclass
class OneRouter:
    router: Router
    url: str
    http: httpx.AsyncClient
    stack: contextlib.AsyncExitStack

    async def send(self, key: str | None, last_id: str | None = None, **fields: Any) -> httpx.Response:
        """The whole answer."""
        return await self.http.request(**_request(key, last_id, fields))

    def streamed(self, key: str | None, last_id: str | None = None, **fields: Any) -> Any:
        """The answer as it comes, in an `async with`."""
        return self.http.stream(**_request(key, last_id, {"stream": True, **fields}))

    async def read(
        self, received: Received, key: str, num_bytes: int = 1 << 40, **fields: Any
    ) -> tuple[int, httpx.Response]:
        """Go on reading a stream, up to so many bytes. Returns how many came."""
        size = 0
        async with self.streamed(key, received.last_id, **fields) as response:
            if response.status_code != 200:
                await response.aread()
                return 0, response
            async for piece in response.aiter_raw():
                piece = piece[: num_bytes - size]
                received.feed(piece)
                size += len(piece)
                if size >= num_bytes:
                    break
        return size, response

    async def metrics(self) -> dict[str, float]:
        lines = (await self.http.get("/metrics")).text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line[0] != "#"}

    async def kill(self) -> None:
        """As suddenly as a process ends: connections break, and nobody is told anything."""
        for link in self.router.peers.links:
            link.why_down = "killed"
        await self.stack.aclose()


def _request(key: str | None, last_id: str | None, fields: dict[str, Any]) -> dict[str, Any]:
    headers = dict(fields.pop("headers", {}))
    if key is not None:
        headers["idempotency-key"] = key
    if last_id is not None:
        headers["last-event-id"] = last_id
    path = fields.pop("path", "/v1/completions")
    body = fields.pop("body", None) or {"model": "m", "prompt": "count", "max_tokens": 5, **fields}
    return {"method": "POST", "url": path, "json": body, "headers": headers}


@pytest.fixture
async def run_routers():
    """Start routers that know each other, in front of the same servers."""
    async with contextlib.AsyncExitStack() as all_of_them:

        async def start(*servers: ScriptedServer | str, num_routers: int = 2, **given: Any) -> list[OneRouter]:
            urls = []
            for server in servers:
                if isinstance(server, str):
                    urls.append(server)
                else:
                    server.url = await all_of_them.enter_async_context(served(server))
                    urls.append(server.url)
            ports = [free_port() for _ in range(num_routers)]
            return [await all_of_them.enter_async_context(_one(urls, port, ports, given)) for port in ports]

        yield start


@contextlib.asynccontextmanager
async def _one(urls: list[str], port: int, ports: list[int], given: dict[str, Any]) -> AsyncIterator[OneRouter]:
    settings = settings_for([BackendSpec(url=url) for url in urls], **given)
    peers = tuple(f"http://127.0.0.1:{other}" for other in ports if other != port)
    router = Router(dataclasses.replace(settings, peers=peers))
    stack = contextlib.AsyncExitStack()
    async with stack:
        stack.push_async_callback(router.close)
        url = await stack.enter_async_context(served(RouterApp(router), port))
        http = httpx.AsyncClient(base_url=url, trust_env=False, timeout=30)
        async with http:
            router.start()
            await until(lambda: all(backend.available for backend in router.pool))
            yield OneRouter(router, url, http, stack)
    assert router.num_running == 0 and len(router.store) == 0 and router.store.num_bytes == 0
    for backend in router.pool:
        view = backend.view
        assert (view.num_running, view.outstanding_tokens, backend.flights) == (0, 0, set()), backend.url
