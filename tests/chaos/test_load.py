"""Clients that come back: with what they have, to another router, and only when a fault gave them a reason."""

from __future__ import annotations

import contextlib
import json
import time

import aiohttp
import pytest
from aiohttp import web

from tests.chaos.cases import Case
from tests.chaos.client import Door, Outcome, send

EVENTS = [
    {"id": "x", "choices": [{"index": 0, "text": str(number), "finish_reason": "length" if number == 4 else None}]}
    for number in range(5)
]
STREAM = Case(0, "/v1/completions", {"model": "m", "prompt": "count", "stream": True})
PLAIN = Case(1, "/v1/completions", {"model": "m", "prompt": "count"})
WHOLE = {"id": "x", "choices": [{"index": 0, "text": "01234", "finish_reason": "length"}]}


class FakeRouter:
    """Answers from behind the Last-Event-ID on. breaks_after: so many events, of which the last one has no id yet."""

    def __init__(self, breaks_after: int | None = None, refuses: int = 0, says: str = "") -> None:
        self.breaks_after, self.refuses, self.says = breaks_after, refuses, says
        self.headers: list[dict[str, str]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        stream = json.loads(await request.read()).get("stream")
        if self.refuses:
            return web.Response(status=self.refuses, text="no")
        headers = {"idempotency-key": request.headers.get("idempotency-key", "made-here")}
        if not stream:
            if self.breaks_after is not None:
                assert request.transport is not None
                request.transport.abort()
            return web.json_response(WHOLE, headers=headers)
        response = web.StreamResponse(headers={"content-type": "text/event-stream", **headers})
        await response.prepare(request)
        begin = int(request.headers.get("last-event-id", "k:0").split(":")[1])
        for number, event in enumerate(EVENTS[begin:], begin):
            await response.write(f"data: {json.dumps(event)}\n".encode())
            if self.breaks_after is not None and number + 1 - begin == self.breaks_after:
                await response.write(self.says.encode() or b"\n")
                assert request.transport is not None
                request.transport.close()
                return response
            has_id = "idempotency-key" in request.headers or "x-shoal-resumable" in request.headers
            await response.write(f"id: k:{number + 1}\n\n".encode() if has_id else b"\n")
        await response.write(b"data: [DONE]\n\n")
        return response


@contextlib.asynccontextmanager
async def doors_of(*routers):
    async with contextlib.AsyncExitStack() as stack:
        doors = []
        for router in routers:
            app = web.Application()
            app.router.add_post("/v1/completions", router.answer)
            runner = web.AppRunner(app)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            doors.append(Door(f"http://127.0.0.1:{runner.addresses[0][1]}"))
        http = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10)))
        yield http, doors


# Which door is first comes from the marker: of this one the first.
MARKER = "chaos-000000000004"


async def asked(http, doors, case, way):
    outcome = Outcome(case, MARKER, time.monotonic(), way)
    await send(http, doors, outcome)
    return outcome


@pytest.mark.parametrize("way", ["keyed", "asked"])
async def test_a_stream_goes_on_behind_the_last_event_that_is_whole(way):
    broken, whole = FakeRouter(breaks_after=3), FakeRouter()
    async with doors_of(broken, whole) as (http, doors):
        doors[0].begin_to_break()
        outcome = await asked(http, doors, STREAM, way)
    assert outcome.fault is None and outcome.num_resumed == 1
    assert outcome.content is not None and outcome.content["choices"][0]["text"] == "01234"
    (first,), (second,) = broken.headers, whole.headers
    assert second["last-event-id"] == "k:2", "the third event had no id"
    assert second["idempotency-key"] == (first["idempotency-key"] if way == "keyed" else "made-here")
    assert doors[1].num_answers == 1 and doors[0].num_answers == 0


async def test_a_plain_request_is_asked_for_again_with_its_key():
    broken, whole = FakeRouter(breaks_after=0), FakeRouter()
    async with doors_of(broken, whole) as (http, doors):
        doors[0].begin_to_break()
        outcome = await asked(http, doors, PLAIN, "keyed")
    assert outcome.fault is None and outcome.num_resumed == 1
    assert broken.headers[0]["idempotency-key"] == whole.headers[0]["idempotency-key"]


@pytest.mark.parametrize(
    ("router", "way"),
    [
        (FakeRouter(breaks_after=3), "keyed"),
        (FakeRouter(breaks_after=3), "plain"),
        (FakeRouter(refuses=503), "keyed"),
        (FakeRouter(refuses=409), "keyed"),
        (FakeRouter(breaks_after=1, says='\ndata: {"error": {"message": "bad", "code": "unavailable"}}\n\n'), "keyed"),
    ],
)
async def test_what_breaks_without_a_fault_is_one(router, way):
    async with doors_of(router, FakeRouter()) as (http, doors):
        outcome = await asked(http, doors, STREAM, way)
    assert outcome.fault is not None and outcome.content is None and outcome.num_resumed == 0


@pytest.mark.parametrize(
    ("router", "way"),
    [
        (FakeRouter(breaks_after=3), "plain"),
        (FakeRouter(refuses=409), "keyed"),
        (
            FakeRouter(breaks_after=1, says='\ndata: {"error": {"message": "bad", "code": "cannot_resume"}}\n\n'),
            "keyed",
        ),
    ],
)
async def test_a_fault_excuses_nothing_but_a_broken_connection_of_a_request_with_a_key(router, way):
    async with doors_of(router, FakeRouter()) as (http, doors):
        doors[0].begin_to_break()
        outcome = await asked(http, doors, STREAM, way)
    assert outcome.fault is not None and outcome.content is None


async def test_a_router_that_ended_and_one_that_says_that_it_ends():
    says = '\ndata: {"error": {"message": "it was shut down", "code": "unavailable"}}\n\n'
    for router in (FakeRouter(breaks_after=2, says=says), FakeRouter(refuses=503)):
        whole = FakeRouter()
        async with doors_of(router, whole) as (http, doors):
            doors[0].begin_to_break()
            outcome = await asked(http, doors, STREAM, "keyed")
        assert outcome.fault is None and outcome.content is not None and outcome.num_resumed == 1
