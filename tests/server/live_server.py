"""The app served by uvicorn in a thread, over an engine whose core is a FakeClient: real HTTP, no model."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx
import uvicorn

from shoal.config.options import ModelOptions, ServerOptions
from shoal.engine.async_engine import AsyncEngine
from shoal.network import listen, port_of
from shoal.observability.metrics import EngineMetrics
from shoal.server.app import create_app
from shoal.server.observer import MetricsObserver
from tests.engine.fake_client import FakeClient, Script, counting, make_config
from tests.engine.tokenizers_for_tests import tokenizer

Result = TypeVar("Result")


class LiveServer:
    """`engine` and `core` live on the server's event loop: touch them inside of `on_loop` only."""

    engine: AsyncEngine
    core: FakeClient

    def __init__(self, scheme: str, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self.url = f"{scheme}://127.0.0.1:{port}"
        self.port = port
        self._loop = loop

    def on_loop(self, work: Callable[[], Awaitable[Result]]) -> Result:
        async def run() -> Result:
            return await work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    def do(self, work: Callable[[], Result]) -> Result:
        async def run() -> Result:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        async def wait() -> None:
            async with asyncio.timeout(20):
                while not condition():
                    await asyncio.sleep(0.005)

        self.on_loop(wait)

    def idle(self) -> bool:
        return not self.core.running and self.engine.num_unfinished == 0

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, trust_env=False, **{"timeout": 30, **options})


@contextlib.contextmanager
def live_server(
    script: Script = counting,
    *,
    tokens_per_step: int = 1,
    with_tokenizer: bool = True,
    config: dict[str, Any] | None = None,
    model: ModelOptions | None = None,
    engine: dict[str, Any] | None = None,
    http: str = "httptools",
    **options: Any,
) -> Iterator[LiveServer]:
    """options: of ServerOptions. Fails when anything of the engine is left at the end."""
    options.setdefault("served_model_name", ["tiny"])
    server_options = ServerOptions(port=0, **options)
    listener = listen("127.0.0.1", 0)
    loop = asyncio.new_event_loop()
    server = LiveServer("https" if server_options.ssl_certfile else "http", port_of(listener), loop)
    engine_config = make_config(**(config or {}))
    ready, stop = threading.Event(), asyncio.Event()

    async def main() -> None:
        metrics = EngineMetrics("tiny")
        server.core = FakeClient(engine_config, script, tokens_per_step)
        server.engine = AsyncEngine(
            server.core,
            engine_config,
            tokenizer() if with_tokenizer else None,
            observer=MetricsObserver(metrics),
            **(engine or {}),
        )
        await server.engine.start()
        app = create_app(server.engine, server_options, model or ModelOptions(model="tiny"), metrics=metrics)
        settings = uvicorn.Config(
            app, http=http, ws="none", lifespan="off", log_config=None, access_log=False,
            ssl_certfile=server_options.ssl_certfile, ssl_keyfile=server_options.ssl_keyfile,
            timeout_graceful_shutdown=3,
        )  # fmt: skip
        uvicorn_server = uvicorn.Server(settings)
        serving = asyncio.create_task(uvicorn_server.serve(sockets=[listener]))
        while not uvicorn_server.started:
            await asyncio.sleep(0.002)
        ready.set()
        await stop.wait()
        await server.engine.close()
        uvicorn_server.should_exit = True
        await serving

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), name="live-server")
    thread.start()
    try:
        assert ready.wait(20), "the server did not come up"
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert not thread.is_alive()
        loop.close()
    assert server.engine.num_unfinished == 0


@contextlib.contextmanager
def in_background(server: LiveServer, body: dict[str, Any]) -> Iterator[None]:
    """A completion that runs beside the test, and succeeds in the end."""
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        response = pool.submit(client.post, "/v1/completions", json=body)
        yield
        assert response.result(20).status_code == 200


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of a response, checked for OpenAI's form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return dict(body["error"])


def trusting(certificate: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate)
