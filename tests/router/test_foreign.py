"""Servers that speak the OpenAI API alone: requests go on by their text."""

from __future__ import annotations

import asyncio
import json

import pytest

from shoal.config.router_settings import BackendSpec
from shoal.router.foreign import EventReader
from tests.router.conftest import events_of, text_of
from tests.router.scripted import Act, ScriptedServer, served

WHOLE = " 0 1 2 3 4"


def foreign() -> ScriptedServer:
    return ScriptedServer(native=False)


def test_events_are_found_however_they_are_cut():
    data = b': ping\n\ndata: {"a": 1}\n\ndata:{"b":\ndata: 2}\r\n\r\nevent: x\ndata: [DONE]\n\ndata: {"half'
    for size in range(1, len(data)):
        reader = EventReader()
        found = [event for at in range(0, len(data), size) for event in reader.feed(data[at : at + size])]
        assert found == [b'{"a": 1}', b'{"b":\n2}', b"[DONE]"], size


@pytest.mark.parametrize("stream", [True, False])
async def test_an_undisturbed_request(run_router, stream):
    running = await run_router(foreign())
    response = await running.complete(
        stream=stream, headers={"authorization": "Bearer clients", "x-request-id": "mine"}
    )
    assert (text_of(response) if stream else response.json()["choices"][0]["text"]) == WHOLE
    headers = running.servers[0].headers[0]
    assert headers["authorization"] == "Bearer clients" and headers["x-request-id"] == "mine"


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("how", ["cut", "half", "error", "end"])
async def test_a_completion_goes_on_by_its_text(run_router, how, after):
    running = await run_router(foreign(), foreign())
    running.servers[0].acts = [Act(how, after)]
    response = await running.complete(stream=True, stream_options={"include_usage": True})
    assert text_of(response) == WHOLE
    (request,) = running.servers[1].requests
    assert (request["prompt"], request["max_tokens"]) == (("count 0 1", 3) if after else ("count", 5))
    events = events_of(response)
    assert events[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert len({event["id"] for event in events}) == 1, "all chunks of an answer have one id"


@pytest.mark.parametrize("after", [0, 2])
async def test_a_chat_goes_on_as_its_last_message(run_router, after):
    running = await run_router(foreign(), foreign())
    running.servers[0].acts = [Act("cut", after)]
    response = await running.chat(stream=True)
    assert text_of(response) == WHOLE
    roles = [event for event in events_of(response) if event["choices"][0]["delta"].get("role")]
    assert len(roles) == 1
    (request,) = running.servers[1].requests
    if after:
        assert request["messages"][1:] == [{"role": "assistant", "content": " 0 1"}]
        assert (request["continue_final_message"], request["add_generation_prompt"]) == (True, False)
    else:
        assert len(request["messages"]) == 1


async def test_a_server_that_is_cut_again(run_router):
    running = await run_router(foreign(), foreign(), foreign())
    running.servers[0].acts, running.servers[1].acts = [Act("cut", 2)], [Act("cut", 1)]
    response = await running.complete(stream=True)
    assert text_of(response) == WHOLE
    assert running.servers[2].requests[0]["prompt"] == "count 0 1 2"


async def test_what_was_cut_off_just_before_its_end_mark_is_whole(run_router):
    running = await run_router(foreign(), foreign())
    running.servers[0].acts = [Act("cut", 4)]
    running.servers[1].acts = [Act("cut", 1)]
    assert text_of(await running.complete(stream=True)) == WHOLE


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"n": 2}, "several answers"),
        ({"logprobs": 1}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"prompt": "count", "guided_json": {"type": "object"}}, "structured"),
        ({"response_format": {"type": "json_object"}}, "structured"),
    ],
)
async def test_what_cannot_go_on_says_so(run_router, fields, why):
    running = await run_router(foreign(), foreign())
    running.servers[0].acts = [Act("cut", 2)]
    events = events_of(await running.complete(stream=True, **fields))
    assert events[-1]["error"]["code"] == "cannot_continue" and why in events[-1]["error"]["message"]
    assert running.servers[1].requests == []


async def test_what_cannot_go_on_may_still_begin_elsewhere(run_router):
    running = await run_router(foreign(), foreign())
    running.servers[0].acts = [Act("cut", 0)]
    response = await running.complete(stream=True, n=2)
    assert text_of(response) == WHOLE


@pytest.mark.parametrize("act", [Act("cut"), Act(status=500), Act(status=503)])
async def test_a_plain_request_is_asked_anew(run_router, act):
    running = await run_router(foreign(), foreign())
    running.servers[0].acts = [act]
    assert (await running.complete()).json()["choices"][0]["text"] == WHOLE


async def test_from_others_servers_to_shoals(run_router):
    running = await run_router(foreign(), ScriptedServer())
    running.servers[0].acts = [Act("cut", 2)]
    assert text_of(await running.complete(stream=True)) == WHOLE
    assert running.servers[1].requests[0]["prompt"] == "count 0 1"


@pytest.mark.parametrize("after", [0, 2])
async def test_from_shoals_servers_to_others(run_router, after):
    """What has begun by frames goes on by frames only; what has not begun may begin anew."""
    other, native = foreign(), ScriptedServer()
    running = await run_router(other, native)
    running.backend(0).draining = True
    native.acts = [Act("cut", after), *[Act("cut")] * 100]
    native.gate.clear()
    streaming = asyncio.create_task(running.complete(stream=True, headers={"x-shoal-deadline": "0.5"}))
    await native.started.wait()
    running.backend(0).draining = False
    native.gate.set()
    response = await streaming
    if after:
        events = events_of(response)
        assert [event["choices"][0]["text"] for event in events[:-1]] == [" 0", " 1"]
        assert events[-1]["error"]["code"] in ("unavailable", "query_of_death") and other.requests == []
    else:
        assert text_of(response) == WHOLE and len(other.requests) == 1


async def test_keys_of_backends(run_router):
    server = foreign()
    running = await run_router(server, keys=[{"key": "secret", "name": "me"}])
    response = await running.complete(headers={"authorization": "Bearer secret"})
    assert response.status_code == 200 and "authorization" not in server.headers[0]
    assert "secret" not in json.dumps(server.headers)


async def test_a_kind_that_is_named_is_not_asked(run_router):
    server = ScriptedServer(native=True)
    async with served(server) as server.url:
        running = await run_router(more=[BackendSpec(url=server.url, kind="openai")], wait=False)
        assert text_of(await running.complete(stream=True)) == WHOLE
        assert server.requests[0]["prompt"] == "count"
