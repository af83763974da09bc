"""The router's entrance: what it takes, what it refuses, its own endpoints."""

from __future__ import annotations

import asyncio

import pytest

from tests.router.conftest import error_of, settings_for, text_of
from tests.router.scripted import Act, ScriptedServer, until

BODY = {"model": "m", "prompt": "count", "max_tokens": 5}


async def test_bodies_that_are_none(run_router):
    running = await run_router(ScriptedServer(), max_request_bytes=200)
    post, json_type = running.client.post, {"content-type": "application/json"}
    for content, words in ((b"", "empty"), (b"{", "not valid JSON"), (b"[1]", "JSON object"), (b"\xff", "not valid")):
        assert words in error_of(await post("/v1/completions", content=content, headers=json_type), 400)["message"]
    assert (
        "text/plain"
        in error_of(await post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}), 415)[
            "message"
        ]
    )
    for content in (b"x" * 201, _pieces()):
        error = error_of(await post("/v1/completions", content=content, headers=json_type), 413)
        assert error["code"] == "request_too_large" and "--max-request-bytes" in error["message"]
    assert error_of(await running.complete(model=7), 400)["param"] == "model"
    error_of(await running.complete(headers={"x-shoal-deadline": "soon"}), 400)
    assert running.servers[0].requests == []


async def _pieces():
    for _ in range(30):
        yield b"x" * 10


async def test_paths_and_methods(run_router):
    running = await run_router(ScriptedServer())
    get, post = running.client.get, running.client.post
    assert "there is no GET /nothing here" in error_of(await get("/nothing"), 404)["message"]
    for path in ("/internal/v1/continue", "/reset_prefix_cache", "/sleep"):
        error_of(await post(path, json={}), 404)
    response = await get("/v1/completions")
    assert error_of(response, 405)["code"] == "method_not_allowed" and response.headers["allow"] == "POST"
    assert (await running.client.head("/health")).status_code == 200


async def test_models_of_all_servers_and_aliases(run_router):
    servers = ScriptedServer(models=("m",)), ScriptedServer(models=("m", "n"))
    running = await run_router(*servers, aliases={"gpt": "n"})
    data = (await running.client.get("/v1/models")).json()["data"]
    assert [card["id"] for card in data] == ["m", "n", "gpt"] and data[2]["max_model_len"] == 64
    assert (await running.client.get("/v1/models/gpt")).json()["id"] == "gpt"
    error_of(await running.client.get("/v1/models/x"), 404)
    error = error_of(await running.complete(model="x"), 404)
    assert error["code"] == "model_not_found" and "there is m, n, gpt" in error["message"]
    for _ in range(3):
        assert text_of(await running.complete(model="gpt", stream=True)) == " 0 1 2 3 4"
    assert servers[0].requests == [] and all(b'"n"' in one.body for one in servers[1].requests)
    error_of(await running.client.post("/v1/completions", json={"prompt": "x"}), 404)


async def test_keys_and_what_they_may(run_router):
    keys = [
        {"key": "one", "name": "first", "models": ["m"], "requests_per_minute": 2},
        {"key": "two", "name": "second"},
    ]
    running = await run_router(ScriptedServer(models=("m", "n")), keys=keys)
    error_of(await running.complete(), 401)
    error_of(await running.complete(headers={"authorization": "Bearer three"}), 401)
    first = {"authorization": "Bearer one"}
    assert "may not use the model 'n'" in error_of(await running.complete(model="n", headers=first), 404)["message"]
    assert [(await running.complete(headers=first)).status_code for _ in range(2)] == [200, 200]
    response = await running.complete(headers=first)
    assert error_of(response, 429)["code"] == "rate_limit_exceeded" and int(response.headers["retry-after"]) > 1
    assert (await running.complete(headers={"authorization": "Bearer two"})).status_code == 200
    assert (await running.client.get("/health")).status_code == 200


async def test_a_full_queue(run_router):
    server = ScriptedServer()
    running = await run_router(server, max_running=1, max_num_waiting=1)
    server.gate.clear()
    answers = [asyncio.create_task(running.complete()) for _ in range(2)]
    await until(lambda: running.router.admission.queue.num_waiting == 1)
    response = await running.complete()
    assert error_of(response, 503)["code"] == "unavailable" and int(response.headers["retry-after"]) >= 1
    server.gate.set()
    assert [(await answer).status_code for answer in answers] == [200, 200]


async def test_draining_a_server(run_router):
    servers = ScriptedServer(), ScriptedServer()
    running = await run_router(*servers)
    servers[0].gate.clear()
    streaming = asyncio.create_task(running.complete(stream=True))
    await until(lambda: len(servers[0].requests) == 1)
    post = running.client.post
    state = (await post("/router/drain", json={"url": servers[0].url + "/v1/"})).json()
    assert state == {"url": servers[0].url, "draining": True, "num_running": 1}
    for _ in range(4):
        await running.complete()
    assert len(servers[0].requests) == 1 and len(servers[1].requests) == 4
    servers[0].gate.set()
    assert text_of(await streaming) == " 0 1 2 3 4"
    listed = (await running.client.get("/router/backends")).json()["backends"]
    assert [one["why_out"] for one in listed] == ["is drained by an operator", None]
    await post("/router/undrain", json={"url": servers[0].url})
    for _ in range(2):
        await running.complete()
    assert len(servers[0].requests) == 2
    assert "there is http" in error_of(await post("/router/drain", json={"url": "http://x"}), 404)["message"]
    error_of(await post("/router/drain", content=b"url=1"), 415)


async def test_the_operators_endpoints_are_the_operators(run_router):
    running = await run_router(ScriptedServer(), admin_key="admin", keys=[{"key": "one", "name": "first"}])
    for headers in ({}, {"authorization": "Bearer one"}, {"authorization": "Basic admin"}):
        error_of(await running.client.get("/router/backends", headers=headers), 401)
    response = await running.client.get("/router/backends", headers={"authorization": "Bearer admin"})
    assert response.json()["backends"][0]["models"] == ["m"]
    error_of(await running.client.get("/router/else", headers={"authorization": "Bearer admin"}), 404)


async def test_probes_and_the_end(run_router):
    server = ScriptedServer()
    running = await run_router(server)
    get = running.client.get

    async def statuses() -> list[int]:
        return [(await get(path)).status_code for path in ("/livez", "/readyz", "/health")]

    assert await statuses() == [200, 200, 200]
    server.health = server.ready = 503
    await until(lambda: not running.backend(0).available)
    assert await statuses() == [200, 200, 503]
    assert "on purpose" in error_of(await get("/health"), 503)["message"]
    server.health = server.ready = 200
    await running.until_in()
    server.gate.clear()
    streaming = asyncio.create_task(running.complete(stream=True))
    await until(lambda: len(server.requests) == 1)
    running.router.begin_drain()
    assert await statuses() == [200, 503, 503]
    assert "shutting down" in error_of(await running.complete(), 503)["message"]
    server.gate.set()
    assert text_of(await streaming) == " 0 1 2 3 4"
    await asyncio.wait_for(running.router.wait_idle(), 5)


async def test_three_states_are_kept_apart(run_router):
    server = ScriptedServer()
    running = await run_router(server)
    server.health = 503
    await until(lambda: not running.backend(0).health.progressing)
    assert (running.backend(0).health.alive, running.backend(0).health.admitting) == (True, True)
    server.ready = 503
    await until(lambda: not running.backend(0).health.admitting)
    assert running.backend(0).health.alive


async def test_metrics(run_router):
    running = await run_router(ScriptedServer(), ScriptedServer())
    running.servers[0].acts = [Act("cut", 2)]
    await running.complete(stream=True)
    await running.complete(model="x")
    text = (await running.client.get("/metrics")).text
    for line in (
        'shoal_router:requests_total{model_name="m",status="200"} 1.0',
        'shoal_router:requests_total{model_name="",status="404"} 1.0',
        'shoal_router:retries_total{reason="lost"} 1.0',
        "shoal_router:requests_moved_total 1.0",
        "shoal_router:tokens_replayed_total 2.0",
        "shoal_router:generation_tokens_total 5.0",
        "shoal_router:time_to_first_token_seconds_count 1.0",
        "shoal_router:added_latency_seconds_count 1.0",
        f'shoal_router:backend_breaker{{backend="{running.servers[0].url}"}} 0.0',
        f'shoal_router:backend_requests_running{{backend="{running.servers[1].url}"}} 0.0',
    ):
        assert line in text.splitlines(), line


async def test_new_settings(run_router):
    servers = ScriptedServer(), ScriptedServer()
    running = await run_router(*servers)
    router, specs = running.router, [backend.spec for backend in running.router.pool]
    servers[0].gate.clear()
    streaming = asyncio.create_task(running.complete(stream=True))
    await until(lambda: len(servers[0].requests) == 1)
    await router.apply(settings_for(specs[1:], aliases={"gpt": "m"}, policy="least-connections"))
    assert (await running.complete(model="gpt")).status_code == 200
    assert len(servers[1].requests) == 1
    servers[0].gate.set()
    assert text_of(await streaming) == " 0 1 2 3 4", "what runs on a server that is gone from the settings finishes"
    with pytest.raises(ValueError, match="no-such"):
        await router.apply(settings_for(specs, policy="no-such"))
    assert len(router.pool) == 1
    await router.apply(settings_for(specs))
    await running.until_in()


@pytest.mark.parametrize("native", [True, False])
async def test_other_paths_are_passed_on(run_router, native):
    servers = ScriptedServer(native), ScriptedServer(native)
    running = await run_router(*servers, aliases={"gpt": "m"})
    servers[0].acts = [Act(status=500)]
    response = await running.client.post("/v1/embeddings?x=1", json={"model": "gpt", "input": "hello"})
    assert response.json() == {"path": "/v1/embeddings", "body": {"model": "m", "input": "hello"}}
    assert len(servers[0].requests) == len(servers[1].requests) == 1
    servers[0].acts = servers[1].acts = [Act(status=400)]
    assert error_of(await running.client.post("/tokenize", json={"prompt": "x"}), 400)["message"] == "on purpose"


async def test_what_may_not_be_repeated_is_not(run_router):
    servers = ScriptedServer(), ScriptedServer()
    running = await run_router(*servers)
    servers[0].acts = servers[1].acts = [Act(status=500)]
    error_of(await running.client.post("/v1/files", json={"model": "m"}), 500)
    assert len(servers[0].requests) + len(servers[1].requests) == 1
