"""Servers that speak the OpenAI API alone: errors in their streams, silence, and streams that lose their end."""

from __future__ import annotations

import asyncio

import pytest

from shoal.router.watch import leave_out
from tests.router.conftest import error_of, events_of, text_of
from tests.router.scripted import Act, ScriptedServer, until

WHOLE = " 0 1 2 3 4"


def foreign() -> ScriptedServer:
    return ScriptedServer(native=False)


def error_event(code: int | str | None, kind: str = "some_error") -> dict[str, object]:
    return {"error": {"message": "on purpose", "type": kind, "param": None, "code": code}}


def states(running) -> set[tuple[str, int]]:
    """Of all breakers: how they are, and how often they opened."""
    now = running.router.pool.clock()
    return {(str(backend.breaker.state(now)), backend.breaker.num_opened) for backend in running.router.pool}


# --- error events ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(
    ("body", "status"),
    [(error_event(400), 400), (error_event("422"), 422), (error_event(None, "invalid_request_error"), 400)],
)
async def test_an_error_event_of_the_request_ends_it(run_router, body, status, after):
    running = await run_router(foreign(), foreign())
    for server in running.servers:
        server.acts = [Act("error", after, body=body)] * 9
    response = await running.complete(stream=True)
    if after:
        assert [event["choices"][0]["text"] for event in events_of(response)[:-1]] == [" 0", " 1"]
        assert events_of(response)[-1]["error"] == body["error"]
    else:
        assert error_of(response, status)["message"] == "on purpose"
    assert sum(len(server.requests) for server in running.servers) == 1
    assert states(running) == {("closed", 0)} and running.router.metrics.retries == {}


@pytest.mark.parametrize("code", [500, 503, None])
async def test_error_events_of_all_servers_reach_the_client(run_router, code):
    running = await run_router(foreign(), foreign())
    for server in running.servers:
        server.acts = [Act("error", 0, body=error_event(code))] * 20
    assert error_of(await running.complete(stream=True), code or 500)["message"] == "on purpose"
    assert sum(len(server.requests) for server in running.servers) == 3
    assert states(running) == {("closed", 0)}


@pytest.mark.parametrize("native", [True, False])
async def test_one_request_opens_no_breaker(run_router, native):
    """It is asked again and again, for another server may come back."""
    running = await run_router(ScriptedServer(native), ScriptedServer(native))
    running.backend(1).draining = True
    running.servers[0].acts = [Act(status=500)] * 20
    error_of(await running.complete(), 500)
    assert len(running.servers[0].requests) == 12
    assert states(running) == {("closed", 0)}


async def test_a_refusal_that_the_client_gets_is_no_retry(run_router):
    running = await run_router(foreign(), foreign())
    for server in running.servers:
        server.acts = [Act(status=400)]
    error_of(await running.complete(), 400)
    assert running.router.metrics.retries == {}


# --- silence ---------------------------------------------------------------------------------------------------------


async def test_a_plain_request_that_is_never_answered_ends_at_its_deadline(run_router):
    running = await run_router(foreign())
    running.servers[0].acts = [Act("hang")]
    response = await asyncio.wait_for(running.complete(headers={"x-shoal-deadline": "0.6"}), 10)
    assert error_of(response, 503)["code"] == "deadline_exceeded"


async def test_a_plain_request_that_is_not_answered_moves(run_router):
    running = await run_router(foreign(), foreign())
    running.servers[0].acts = [Act("hang")]
    response = await asyncio.wait_for(running.complete(headers={"x-shoal-deadline": "2"}), 10)
    assert response.json()["choices"][0]["text"] == WHOLE
    assert len(running.servers[0].requests) == len(running.servers[1].requests) == 1


@pytest.mark.parametrize("fields", [{}, {"n": 2}])
async def test_a_stream_that_stalls_moves_where_it_can(run_router, fields):
    running = await run_router(foreign(), foreign())
    running.servers[0].acts = [Act("silent", 2)]
    response = await asyncio.wait_for(running.complete(stream=True, headers={"x-shoal-deadline": "2"}, **fields), 10)
    if fields:
        assert events_of(response)[-1]["error"]["code"] == "deadline_exceeded" and running.servers[1].requests == []
    else:
        assert text_of(response) == WHOLE and running.servers[1].requests[0]["prompt"] == "count 0 1"


async def test_a_server_that_is_slow_with_one_request_keeps_its_breaker(run_router):
    """It answers others meanwhile."""
    running = await run_router(foreign(), foreign())
    slow = running.servers[0]
    slow.acts = [Act("hang")]
    hanging = asyncio.create_task(running.complete(headers={"x-shoal-deadline": "2"}))
    await until(lambda: len(slow.requests) == 1)
    for _ in range(2):
        assert (await running.complete()).status_code == 200
    assert (await hanging).json()["choices"][0]["text"] == WHOLE
    assert running.backend(0).breaker._num_failed == 0


# --- other paths -----------------------------------------------------------------------------------------------------


async def test_other_paths_move_from_a_server_that_does_not_answer(run_router):
    running = await run_router(ScriptedServer(), ScriptedServer())
    running.servers[0].acts = [Act("hang")]
    body, headers = {"model": "m", "input": "x"}, {"x-shoal-deadline": "2"}
    response = await asyncio.wait_for(running.client.post("/v1/embeddings", json=body, headers=headers), 10)
    assert response.status_code == 200 and len(running.servers[1].requests) == 1


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/files"])
async def test_other_paths_end_at_their_deadline(run_router, path):
    running = await run_router(ScriptedServer())
    running.servers[0].acts = [Act("hang")]
    headers = {"x-shoal-deadline": "0.6"}
    response = await asyncio.wait_for(running.client.post(path, json={"model": "m"}, headers=headers), 10)
    assert error_of(response, 503)["code"] == "deadline_exceeded"


async def test_other_paths_give_up_a_server_that_is_dead(run_router):
    running = await run_router(ScriptedServer(), ScriptedServer(), stall_timeout=0.3)
    running.servers[0].acts = running.servers[1].acts = [Act("hang")]
    waiting = asyncio.create_task(running.client.post("/v1/files", json={"model": "m"}))
    await until(lambda: any(server.requests for server in running.servers))
    (backend,) = [backend for backend in running.router.pool if backend.flights]
    leave_out(backend, "it is gone", interrupt=True)
    assert "may have done the work: it is gone" in error_of(await asyncio.wait_for(waiting, 10), 503)["message"]


async def test_other_paths_wait_for_a_place(run_router):
    running = await run_router(ScriptedServer(), max_running=1)
    (server,) = running.servers
    server.acts = [Act("hang")]
    first = asyncio.create_task(running.client.post("/tokenize", json={"model": "m"}))
    await until(lambda: len(server.requests) == 1)
    second = asyncio.create_task(running.client.post("/tokenize", json={"model": "m"}))
    await until(lambda: running.router.admission.queue.num_waiting == 1)
    assert len(server.requests) == 1
    first.cancel()
    assert (await second).status_code == 200


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
async def test_a_stream_that_is_cut_before_its_usage_has_one(run_router, chat):
    running = await run_router(foreign(), foreign())
    running.servers[0].acts = [Act("before usage", 99)]
    ask = running.chat if chat else running.complete
    response = await ask(stream=True, stream_options={"include_usage": True})
    assert text_of(response) == WHOLE and running.servers[1].requests == []
    with_usage = [event for event in events_of(response) if event.get("usage")]
    assert with_usage == events_of(response)[-1:]
    assert with_usage[0]["choices"] == []
    # No server has said how long the prompt is.
    assert with_usage[0]["usage"] == {"prompt_tokens": 0, "completion_tokens": 5, "total_tokens": 5}


async def test_who_wants_no_usage_gets_none(run_router):
    running = await run_router(foreign(), foreign())
    running.servers[0].acts = [Act("before usage", 99)]
    response = await running.complete(stream=True)
    assert text_of(response) == WHOLE and not any("usage" in event for event in events_of(response))
