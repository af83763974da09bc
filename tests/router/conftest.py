from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from shoal.config.options import RouterOptions
from shoal.config.router_settings import BackendSpec, GoldenSpec, RouterSettings
from shoal.router.app import RouterApp
from shoal.router.core import Router
from tests.router.scripted import ScriptedServer, served, until


def settings_for(backends: list[BackendSpec], **given: Any) -> RouterSettings:
    """given: of RouterOptions, or aliases, keys, golden."""
    own = {name: given.pop(name) for name in ("aliases", "keys", "golden") if name in given}
    options = RouterOptions(**{"probe_interval": 0.05, "policy": "round-robin", **given})
    return RouterSettings(
        options=options,
        backends=tuple(backends),
        aliases=own.get("aliases", {}),
        golden=own.get("golden", GoldenSpec(prompt="golden?")),
        keys=own.get("keys"),
        keys_source="keys",
    )


@dataclasses.dataclass
class RunningRouter:
    router: Router
    servers: list[ScriptedServer]
    client: httpx.AsyncClient
    url: str

    async def complete(self, **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", {})
        body = {"model": "m", "prompt": "count", "max_tokens": 5, **fields}
        return await self.client.post("/v1/completions", json=body, headers=headers)

    async def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": "m", "messages": [{"role": "user", "content": "count"}], "max_tokens": 5, **fields}
        return await self.client.post("/v1/chat/completions", json=body)

    def backend(self, index: int) -> Any:
        return self.router.pool.get(self.servers[index].url)

    async def until_in(self, *indices: int) -> None:
        wanted = indices or range(len(self.servers))
        await until(lambda: all(self.backend(index).available for index in wanted))


@pytest.fixture
async def run_router():
    """Start servers and a router in front of them; servers may be given as URLs, too."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*servers: ScriptedServer, wait: bool = True, **given: Any) -> RunningRouter:
            for server in servers:
                server.url = await stack.enter_async_context(served(server))
            specs = [BackendSpec(url=server.url) for server in servers] + given.pop("more", [])
            return await stack.enter_async_context(_running(list(servers), settings_for(specs, **given), wait))

        yield start


@contextlib.asynccontextmanager
async def _running(servers: list[ScriptedServer], settings: RouterSettings, wait: bool) -> AsyncIterator[RunningRouter]:
    router = Router(settings)
    try:
        async with (
            served(RouterApp(router)) as url,
            httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as client,
        ):
            running = RunningRouter(router, servers, client, url)
            router.start()
            if wait:
                await running.until_in()
            yield running
    finally:
        await router.close()
    assert router.num_running == 0
    for backend in router.pool:
        view = backend.view
        assert (view.num_running, view.outstanding_tokens, backend.flights) == (0, 0, set()), backend.url


def events_of(response: httpx.Response) -> list[Any]:
    """The events of a stream that ended as it should; the last one may be an error."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    if data[-1] == "[DONE]":
        return [json.loads(one) for one in data[:-1]]
    events = [json.loads(one) for one in data]
    assert "error" in events[-1], "the stream ends neither with [DONE] nor with an error"
    return events


def text_of(response: httpx.Response) -> str:
    """All text of a stream without error."""
    texts = []
    for event in events_of(response):
        assert "error" not in event, event
        texts += [choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in event["choices"]]
    return "".join(texts)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of a response, checked for OpenAI's form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])
