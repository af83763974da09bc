"""Requests over servers that speak frames and fail in every way: the client sees nothing of it."""

from __future__ import annotations

import asyncio
import json

import pytest

from shoal.config.router_settings import BackendSpec
from tests.router.conftest import error_of, events_of, text_of
from tests.router.scripted import Act, ScriptedServer, served, until

WHOLE = " 0 1 2 3 4"


def served_ids(servers):
    """What the second of two servers was told that is there already."""
    (request,) = servers[1].requests
    return [answer.token_ids for answer in request.answers]


async def test_an_undisturbed_request(run_router):
    running = await run_router(ScriptedServer())
    response = await running.complete(stream=True, headers={"x-request-id": "mine"})
    assert text_of(response) == WHOLE and response.headers["x-request-id"] == "mine"
    plain = await running.complete()
    assert plain.json()["choices"][0]["text"] == WHOLE
    (first, second) = running.servers[0].requests
    assert (first.request_id, first.path) == ("mine", "/v1/completions") and first.seed != second.seed
    assert json.loads(first.body)["prompt"] == "count" and first.prompts is None and first.answers == []


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("how", ["cut", "half", "lost", "garbage"])
async def test_a_server_that_breaks_off(run_router, how, after, stream):
    running = await run_router(ScriptedServer(), ScriptedServer())
    running.servers[0].acts = [Act(how, after)]
    response = await running.complete(stream=stream)
    text = text_of(response) if stream else response.json()["choices"][0]["text"]
    assert text == WHOLE
    assert served_ids(running.servers) == ([list(range(after))] if after else [])
    first, second = running.servers[0].requests[0], running.servers[1].requests[0]
    # A connection that breaks says nothing of the engine, while the server is still there.
    assert second.num_crashes == (how == "lost") and second.prompts == [[7, 8, 9]]
    assert (first.seed, first.created, first.request_id) == (second.seed, second.created, second.request_id)
    assert running.router.metrics.num_replayed == after


async def test_a_server_that_shuts_down_is_no_crash(run_router):
    running = await run_router(ScriptedServer(), ScriptedServer())
    running.servers[0].acts = [Act("moved", 2)]
    assert text_of(await running.complete(stream=True)) == WHOLE
    assert running.servers[1].requests[0].num_crashes == 0
    assert running.router.metrics.retries == {"moved": 1}


@pytest.mark.parametrize("how", ["silent", "stalled", "hang"])
async def test_a_server_that_stalls_is_left_out_and_comes_back(run_router, how):
    running = await run_router(ScriptedServer(), ScriptedServer(), stall_timeout=0.3)
    running.servers[0].acts = [Act(how, 3)]
    before = running.servers[0].num_golden
    assert text_of(await running.complete(stream=True)) == WHOLE
    # An engine that stands still may do so because of the request.
    assert running.servers[1].requests[0].num_crashes == (how == "stalled")
    await running.until_in()
    assert running.servers[0].num_golden == before + 1


async def test_all_requests_of_a_silent_server_move(run_router):
    first, second = ScriptedServer(), ScriptedServer()
    running = await run_router(first, second, stall_timeout=0.5)
    first.acts = [Act("silent", 2)] * 3
    responses = await asyncio.gather(*(running.complete(stream=True) for _ in range(6)))
    assert [text_of(response) for response in responses] == [WHOLE] * 6
    assert len(first.requests) == 3 and len(second.requests) == 6


@pytest.mark.parametrize("status", [500, 502, 503, 429, 404, 401])
async def test_a_refusal_that_is_not_the_clients_fault(run_router, status):
    running = await run_router(ScriptedServer(), ScriptedServer())
    running.servers[0].acts = [Act(status=status)]
    assert text_of(await running.complete(stream=True)) == WHOLE
    assert running.router.metrics.retries == {f"status_{status}": 1}


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_refusal_that_is(run_router, status):
    running = await run_router(ScriptedServer(), ScriptedServer())
    running.servers[0].acts = [Act(status=status)]
    assert error_of(await running.complete(stream=True), status)["message"] == "on purpose"
    assert running.servers[1].requests == []


async def test_errors_of_all_servers_reach_the_client(run_router):
    running = await run_router(ScriptedServer(), ScriptedServer())
    for server in running.servers:
        server.acts = [Act(status=500)] * 5
    assert error_of(await running.complete(), 500)["message"] == "on purpose"
    assert sum(len(server.requests) for server in running.servers) == 3


async def test_a_busy_fleet_says_when_to_come_back(run_router):
    running = await run_router(ScriptedServer())
    running.servers[0].acts = [Act(status=503, headers={"retry-after": "7"})] * 100
    response = await running.complete(headers={"x-shoal-deadline": "0.3"})
    error_of(response, 503)
    assert response.headers["retry-after"] == "7" and len(running.servers[0].requests) > 1


async def test_an_error_of_the_request_itself(run_router):
    running = await run_router(ScriptedServer(), ScriptedServer())
    running.servers[0].acts = [Act("error", 0), Act("error", 2)]
    error_of(await running.complete(stream=True), 503)
    running.router.pool.get(running.servers[1].url).draining = True
    events = events_of(await running.complete(stream=True))
    assert len(events) == 3 and events[-1]["error"]["message"] == "on purpose"
    assert running.servers[1].requests == []


async def test_a_query_of_death_runs_alone_and_fails_by_name(run_router):
    running = await run_router(ScriptedServer(), ScriptedServer(), ScriptedServer())
    for server in running.servers:
        server.acts = [Act("lost", 1)]
    events = events_of(await running.complete(stream=True, headers={"x-request-id": "deadly"}))
    assert events[-1]["error"]["code"] == "query_of_death" and "deadly" in events[-1]["error"]["message"]
    assert [event["choices"][0]["text"] for event in events[:-1]] == [" 0", " 1", " 2"]
    requests = [server.requests[0] for server in running.servers]
    assert sorted((one.num_crashes, one.alone) for one in requests) == [(0, False), (1, False), (2, True)]


async def test_a_request_without_progress_ends_at_its_deadline(run_router):
    running = await run_router(ScriptedServer(), ScriptedServer())
    running.servers[0].acts = [Act("beats", 0), Act("beats", 2)]
    assert error_of(await running.complete(headers={"x-shoal-deadline": "0.3"}), 503)["code"] == "deadline_exceeded"
    running.backend(1).draining = True
    events = events_of(await running.complete(stream=True, headers={"x-shoal-deadline": "0.3"}))
    assert events[-1]["error"]["code"] == "deadline_exceeded"


async def test_nobody_is_there_and_then_somebody_is(run_router):
    first = ScriptedServer()
    running = await run_router(first)
    first.health = first.ready = 503
    await until(lambda: not running.backend(0).available)
    waiting = asyncio.create_task(running.complete(stream=True))
    await until(lambda: running.router.num_running == 1)
    assert first.requests == []
    first.health = first.ready = 200
    assert text_of(await waiting) == WHOLE


async def test_nobody_is_there_until_the_deadline(run_router):
    running = await run_router(ScriptedServer())
    running.servers[0].health = running.servers[0].ready = 503
    await until(lambda: not running.backend(0).available)
    response = await running.complete(headers={"x-shoal-deadline": "0.2"})
    assert "no server of the model 'm'" in error_of(response, 503)["message"]
    assert response.headers["retry-after"] == "1"


async def test_a_server_that_comes_back_on_its_port_in_mid_stream(run_router):
    """A single server: its end in the middle of a stream is survived by waiting for it."""
    first = ScriptedServer()
    async with served(first) as url:
        first.url = url
        running = await run_router(more=[BackendSpec(url=url)], wait=False)
        running.servers.append(first)
        await running.until_in()
        first.acts = [Act("cut", 2)]
        first.pause = 0.01
        streaming = asyncio.create_task(running.complete(stream=True))
        await until(lambda: len(first.requests) == 1)
    await until(lambda: not running.backend(0).available)
    second = ScriptedServer()
    async with served(second, int(url.rsplit(":", 1)[1])):
        assert text_of(await streaming) == WHOLE


async def test_a_clients_disconnect_reaches_the_server(run_router):
    server = ScriptedServer()
    running = await run_router(server)
    server.pause = 0.01
    async with running.client.stream(
        "POST", "/v1/completions", json={"model": "m", "prompt": "x", "max_tokens": 100000, "stream": True}
    ) as response:
        async for _ in response.aiter_raw():
            break
    await asyncio.wait_for(server.disconnected.wait(), 10)
    await until(lambda: server.num_open == 0 and running.router.num_running == 0)


async def test_a_slow_client_slows_its_server_down(run_router):
    server = ScriptedServer()
    running = await run_router(server)
    server.padding = "x" * 20000
    body = json.dumps({"model": "m", "prompt": "x", "max_tokens": 300000, "stream": True}).encode()
    port = int(running.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    )
    writer.write(head.encode() + b"\r\n" + body)
    await reader.readline()
    before = -1
    while server.num_sent != before:  # until nothing moves any more: all buffers on the way are full
        before = server.num_sent
        await asyncio.sleep(0.3)
    assert 0 < before < 300000, "somebody took everything in"
    writer.transport.abort()
    await until(lambda: server.num_open == 0)


async def test_a_crash_of_the_only_server_loses_none_of_its_requests(run_router):
    """All go on as soon as it is back, and not one after the other."""
    running = await run_router(ScriptedServer())
    (server,) = running.servers
    server.acts = [Act("lost", 1)] * 8
    responses = await asyncio.gather(
        *(running.complete(stream=True, headers={"x-shoal-deadline": "20"}) for _ in range(8))
    )
    assert [text_of(response) for response in responses] == [WHOLE] * 8
    assert str(running.router.pool.get(server.url).breaker.state(running.router.pool.clock())) == "closed"
