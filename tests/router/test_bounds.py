"""What a request may wait for and how much of it is held: before servers are known, by its deadline, from one event."""

from __future__ import annotations

import asyncio
import time

import pytest

from shoal.config.router_settings import BackendSpec
from shoal.router.foreign import MAX_EVENT_BYTES, EventReader
from shoal.router.outcome import Lost
from tests.router.conftest import error_of, text_of
from tests.router.scripted import Act, ScriptedServer, served, until

# Nothing listens there: connections are refused.
NOBODY = "http://127.0.0.1:9"


# --- before a server has told its models -----------------------------------------------------------------------------


async def test_who_waits_for_the_first_server_is_in_the_queue(run_router):
    """They count as waiting, the queue's bound holds for them, and all of them are answered when a server comes."""
    server = ScriptedServer()
    server.health = server.ready = 503
    async with served(server) as server.url:
        more = [BackendSpec(url=server.url), BackendSpec(url=NOBODY)]
        running = await run_router(more=more, wait=False, max_num_waiting=2)
        answers = [asyncio.create_task(running.complete()) for _ in range(2)]
        await until(lambda: running.router.admission.queue.num_waiting == 2)
        passed = await running.client.post("/v1/embeddings", json={"model": "m", "input": "x"})
        for response in (await running.complete(), passed):
            assert "too many requests wait" in error_of(response, 503)["message"]
            assert int(response.headers["retry-after"]) >= 1
        text = (await running.client.get("/metrics")).text
        assert "shoal_router:num_requests_waiting 2.0" in text.splitlines()
        server.health = server.ready = 200
        assert [(await answer).status_code for answer in answers] == [200, 200]
        queue = running.router.admission.queue
        assert (queue.num_waiting, queue.waiting_bytes, queue.num_running) == (0, 0, 0)


async def test_who_waits_for_the_first_server_holds_so_many_bytes_only(run_router):
    running = await run_router(more=[BackendSpec(url=NOBODY)], wait=False)
    queue = running.router.admission.queue
    large = {"prompt": "x" * 10_000_000, "headers": {"x-shoal-deadline": "3"}}
    answers = [asyncio.create_task(running.complete(**large)) for _ in range(30)]
    refused = [answer for answer in asyncio.as_completed(answers)]
    for answer in refused:
        response = await answer
        assert queue.waiting_bytes <= queue.limits.max_waiting_bytes == 256 * 1024 * 1024
        error_of(response, 503)
    assert (queue.num_waiting, queue.waiting_bytes) == (0, 0)


async def test_a_client_that_goes_away_leaves_its_place(run_router):
    running = await run_router(more=[BackendSpec(url=NOBODY)], wait=False, max_num_waiting=1)
    waiting = asyncio.create_task(running.complete())
    await until(lambda: running.router.admission.queue.num_waiting == 1)
    waiting.cancel()
    await until(lambda: running.router.admission.queue.num_waiting == 0)


# --- the deadline ----------------------------------------------------------------------------------------------------


async def test_the_wait_for_a_first_server_ends_at_the_deadline(run_router):
    running = await run_router(more=[BackendSpec(url=NOBODY)], wait=False)
    began = time.monotonic()
    response = await running.complete(headers={"x-shoal-deadline": "0.5"})
    assert 0.5 <= time.monotonic() - began < 5
    assert "no connection" in error_of(response, 503)["message"] and int(response.headers["retry-after"]) >= 1


async def test_the_deadline_counts_from_the_arrival_once(run_router):
    """Two thirds of it pass before the model is known, the rest in the queue: nothing is left for a server."""
    server = ScriptedServer()
    server.health = server.ready = 503
    async with served(server) as server.url:
        running = await run_router(more=[BackendSpec(url=server.url)], wait=False, max_running=1)
        router = running.router
        router.admission.set_capacity(0)
        began = time.monotonic()
        answer = asyncio.create_task(running.complete(headers={"x-shoal-deadline": "3"}))
        await until(lambda: router.admission.queue.num_waiting == 1)
        await asyncio.sleep(2 - (time.monotonic() - began))
        server.health = server.ready = 200
        await until(lambda: router.pool.models() == ["m"])
        response = await answer
        assert "no server had room" in error_of(response, 503)["message"]
        assert 3 <= time.monotonic() - began < 4.5 and server.requests == []


async def test_time_in_the_queue_counts_where_no_server_is_there(run_router):
    """It is admitted when most of its time is over, and nobody is there then: it does not get all of it again."""
    server = ScriptedServer()
    running = await run_router(server, max_running=1)
    running.router.admission.set_capacity(0)
    began = time.monotonic()
    answer = asyncio.create_task(running.complete(headers={"x-shoal-deadline": "2"}))
    await until(lambda: running.router.admission.queue.num_waiting == 1)
    running.backend(0).draining = True
    await asyncio.sleep(1.5 - (time.monotonic() - began))
    running.router.admission.set_capacity(1)
    response = await answer
    assert "could take the request for 2 s" in error_of(response, 503)["message"]
    assert 2 <= time.monotonic() - began < 3


@pytest.mark.parametrize(
    "value", ["soon", "", "0", "0.0", "-1", "+1", "1_0", "nan", "inf", "-inf", "1e3", "0x10", "5, 7", "١٠", "1" * 12]
)
async def test_deadlines_that_are_none(run_router, value):
    running = await run_router(ScriptedServer())
    for path, body in (
        ("/v1/completions", {"model": "m", "prompt": "count"}),
        ("/v1/embeddings", {"model": "m", "input": "x"}),
    ):
        headers = {"x-shoal-deadline": value.encode("utf-8")}
        error = error_of(await running.client.post(path, json=body, headers=headers), 400)
        assert "x-shoal-deadline must be one number of seconds above 0" in error["message"]
    assert running.servers[0].requests == []


async def test_a_deadline_that_is_there_twice_is_none(run_router):
    running = await run_router(ScriptedServer())
    body = {"model": "m", "prompt": "count"}
    headers = [("x-shoal-deadline", "5"), ("x-shoal-deadline", "7")]
    error = error_of(await running.client.post("/v1/completions", json=body, headers=headers), 400)
    assert "got '5, 7'" in error["message"]
    for value in ("5", "0.5", "20.25"):
        assert (await running.complete(headers={"x-shoal-deadline": value})).status_code == 200


# --- one event -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1 << 16, 1 << 20])
def test_an_event_without_an_end_is_given_up(piece):
    reader = EventReader()
    num_fed = 0
    began = time.process_time()
    with pytest.raises(Lost, match=f"an event of more than {MAX_EVENT_BYTES} bytes"):
        while True:
            assert reader.feed(b"data: " if not num_fed else b"x" * piece) == []
            num_fed += piece
    assert num_fed <= MAX_EVENT_BYTES + 2 * piece and time.process_time() - began < 5


def test_events_below_the_bound_are_whole():
    reader = EventReader()
    value = b'"' + b"x" * (MAX_EVENT_BYTES - 100) + b'"'
    stream = b"data: " + value + b"\n\ndata: 1\n\n"
    found = [event for at in range(0, len(stream), 65536) for event in reader.feed(stream[at : at + 65536])]
    assert found == [value, b"1"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_all_ends_of_lines_wherever_they_are_cut(end):
    lines = [b": ping", b"", b"event: x", b"id: 3", b'data: {"a":', b"data:1}", b"", b"", b"data: [DONE]", b"", b""]
    stream = end.join(lines)
    for size in range(1, len(stream)):
        reader = EventReader()
        found = [event for at in range(0, len(stream), size) for event in reader.feed(stream[at : at + size])]
        assert found == [b'{"a":\n1}', b"[DONE]"], size


class OddServer(ScriptedServer):
    """Speaks the OpenAI API alone, in events of several lines that end in CR LF; or in one event without an end."""

    endless = False
    num_bytes = 0

    async def _events(self, send, act, request, chat):
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        if self.endless:
            await self._send(send, b"data: ")
            while self.num_bytes < 4 * MAX_EVENT_BYTES:
                await self._send(send, b"x" * 65536)
                self.num_bytes += 65536
        for number in range(5):
            data = b'data: {"id": "a",\r\ndata:  "choices": [{"index": 0, "text": " %d"}]}\r\n\r\n' % number
            await self._send(send, data)
        await self._send(send, b"data: [DONE]\r\n\r\n")
        await send({"type": "http.response.body", "body": b""})


async def test_events_of_several_lines_reach_the_client_whole(run_router):
    running = await run_router(OddServer(native=False))
    response = await running.complete(stream=True)
    assert text_of(response) == " 0 1 2 3 4"
    assert all(line.startswith("data: ") for line in response.text.split("\n") if line)


async def test_a_server_that_sends_an_event_without_an_end_is_broken(run_router):
    broken = OddServer(native=False)
    broken.endless = True
    running = await run_router(broken, ScriptedServer(native=False))
    assert text_of(await running.complete(stream=True)) == " 0 1 2 3 4"
    await until(broken.disconnected.is_set)
    assert broken.num_bytes < 2 * MAX_EVENT_BYTES
    assert running.router.metrics.retries == {"lost": 1}


# --- models that are configured --------------------------------------------------------------------------------------


async def test_a_configured_model_whose_server_is_down_is_unavailable(run_router):
    """Not "there is no such model", which clients take for final."""
    other = ScriptedServer(models=("other",))
    configured = [BackendSpec(url=NOBODY, models=("big",)), BackendSpec(url="http://127.0.0.1:11")]
    running = await run_router(other, more=configured, aliases={"alias": "big", "gpt": "later"}, wait=False)
    await until(lambda: running.backend(0).available and all(backend.was_asked for backend in running.router.pool))
    for model in ("big", "alias", "gpt"):
        for stream in (False, True):
            response = await running.complete(model=model, stream=stream, headers={"x-shoal-deadline": "0.3"})
            assert "no connection" in error_of(response, 503)["message"] and int(response.headers["retry-after"]) >= 1
        passed = await running.client.post(
            "/v1/embeddings", json={"model": model, "input": "x"}, headers={"x-shoal-deadline": "0.3"}
        )
        assert error_of(passed, 503) and int(passed.headers["retry-after"]) >= 1
    assert error_of(await running.complete(model="else"), 404)["code"] == "model_not_found"
    assert (await running.complete(model="other")).status_code == 200


async def test_an_act_that_fails_is_tried_within_the_deadline(run_router):
    """The deadline is of waiting, not of the whole answer: a stream that gets on may take longer."""
    server = ScriptedServer()
    server.pause = 0.2
    running = await run_router(server)
    server.acts = [Act()]
    began = time.monotonic()
    response = await running.complete(stream=True, headers={"x-shoal-deadline": "0.8"})
    assert text_of(response) == " 0 1 2 3 4" and time.monotonic() - began > 0.8
