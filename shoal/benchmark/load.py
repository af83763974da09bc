"""The load generator of `shoal bench serve`: sends requests to an OpenAI API by a rate or a concurrency, and listens.

One process with httpx, whose cost bounds what can be measured: 62 µs of CPU a chunk with uvloop, 103 without (2026-11,
one core of an AMD EPYC, 3,400 chunks/s), so some 15,000 chunks a second. `LoadRun.cpu_share` says how near it came.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import importlib.util
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import httpx

from shoal.benchmark.datasets import ServeRequest
from shoal.benchmark.record import RequestRecord

T = TypeVar("T")

RecordCallback = Callable[[RequestRecord], None]


def run_on_loop(work: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, on the faster loop where it is installed."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(work)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return functools.partial(uvloop.new_event_loop)


@dataclasses.dataclass(frozen=True)
class Target:
    """The server. url without /v1; fields: what every request's body has besides. timeout: seconds without a byte.

    chat: ask prompts of text as conversations of one message, too.
    """

    url: str
    model: str
    api_key: str | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    chat: bool = False
    continuous_usage: bool = False
    timeout: float = 600.0

    def http(self) -> httpx.AsyncClient:
        """A client that keeps connections open, as many as there are requests at a time."""
        headers = {"accept-encoding": "identity"} | (
            {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        )
        # The address is one the user named: proxies of the environment are for other places than local servers.
        local = any(f"//{host}" in self.url for host in ("127.0.0.1", "localhost", "[::1]"))
        return httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(self.timeout, connect=30.0, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=not local,
        )

    def body(self, request: ServeRequest) -> tuple[str, dict[str, Any]]:
        """The path and the JSON of a request."""
        usage: dict[str, Any] = {"include_usage": True}
        if self.continuous_usage:
            usage["continuous_usage_stats"] = True
        body: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": usage, **self.fields}
        if request.num_output is not None:
            body["max_tokens"] = request.num_output
        if request.messages is not None:
            return "/v1/chat/completions", body | {"messages": request.messages}
        if self.chat:
            return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": request.prompt}]}
        return "/v1/completions", body | {"prompt": request.prompt}


@dataclasses.dataclass(frozen=True)
class Pace:
    """When requests are sent: `rate` a second by a Poisson process, at most `concurrency` at a time; None: no limit."""

    rate: float | None = None
    concurrency: int | None = None
    seed: int = 0

    def arrival_times(self, num_requests: int) -> list[float]:
        """Seconds after the start, rising; all 0 without a rate."""
        if self.rate is None:
            return [0.0] * num_requests
        generator, now, times = random.Random(self.seed), 0.0, []
        for _ in range(num_requests):
            times.append(now)
            now += generator.expovariate(self.rate)
        return times


class LoadRun:
    """One run over a list of requests. `records` has those that were sent so far, also after `stop`.

    cpu_share: of one core, what this process used while it ran; near 1, it measured itself rather than the server.
    """

    def __init__(self, target: Target, requests: Sequence[ServeRequest], pace: Pace, on_end: RecordCallback) -> None:
        """on_end: called when a request has ended, well or not."""
        self.records: list[RequestRecord] = []
        self.cpu_share = 0.0
        self._target = target
        self._requests = requests
        self._pace = pace
        self._on_end = on_end
        self._main: asyncio.Task[None] | None = None
        self._stopped = False

    async def run(self) -> None:
        """Send all and wait for all; returns early after `stop`."""
        started, cpu_started = time.perf_counter(), time.process_time()
        self._main = asyncio.ensure_future(self._send_all())
        try:
            await self._main
        except asyncio.CancelledError:
            if not self._stopped:
                raise
        finally:
            self.cpu_share = (time.process_time() - cpu_started) / (time.perf_counter() - started)

    def stop(self) -> None:
        """End what runs; it counts as unfinished. From the loop's thread."""
        self._stopped = True
        if self._main is not None:
            self._main.cancel()

    async def _send_all(self) -> None:
        limit = asyncio.Semaphore(self._pace.concurrency) if self._pace.concurrency else None
        async with self._target.http() as http, asyncio.TaskGroup() as running:
            started = time.perf_counter()
            for request, arrival in zip(self._requests, self._pace.arrival_times(len(self._requests)), strict=True):
                await asyncio.sleep(max(0.0, started + arrival - time.perf_counter()))
                if limit is not None:
                    await limit.acquire()
                running.create_task(self._send(http, request, started + arrival, limit))

    async def _send(
        self, http: httpx.AsyncClient, request: ServeRequest, scheduled: float, limit: asyncio.Semaphore | None
    ) -> None:
        path, body = self._target.body(request)
        content = json.dumps(body).encode()
        start = time.perf_counter()
        record = RequestRecord(start if self._pace.rate is None else scheduled, start)
        self.records.append(record)
        try:
            await stream_request(http, path, content, record)
        finally:
            if limit is not None:
                limit.release()
        record.end = time.perf_counter()
        self._on_end(record)


async def stream_request(http: httpx.AsyncClient, path: str, content: bytes, record: RequestRecord) -> None:
    """Send one request and fold its stream into `record`; failures go there too."""
    try:
        async with http.stream("POST", path, content=content, headers={"content-type": "application/json"}) as response:
            if response.status_code != 200:
                await response.aread()
                record.fail(f"HTTP {response.status_code}", response.text[:300])
                return
            async for data in _events(response):
                record.take(data, time.perf_counter())
                if record.error is not None:
                    return
    except httpx.ConnectError as error:
        record.fail("no connection", str(error))
    except httpx.TimeoutException as error:
        record.fail("timeout", type(error).__name__)
    except httpx.TransportError as error:
        record.fail("connection broken", str(error) or type(error).__name__)
    if not record.finished:
        record.fail("cut off", "the stream ended without a finish_reason or [DONE]")
    elif not record.arrivals:
        record.fail("empty answer", "the stream ended without any choice")


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """What follows `data:` in each event. (WHATWG HTML, section 9.2; OpenAI's events are one line each.)"""
    rest = b""
    async with contextlib.aclosing(response.aiter_raw()) as pieces:  # type: ignore[type-var]
        async for piece in pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()
