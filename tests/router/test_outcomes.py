"""How requests end, in the log and in the metrics; and errors that server and router word alike."""

from __future__ import annotations

import logging

import httpx
import pytest

from tests.router.conftest import error_of, events_of
from tests.router.scripted import Act, ScriptedServer, served, until
from tests.server.in_process import in_process_server


async def counted(running) -> dict[str, float]:
    """Requests that ended, by status."""
    lines = (await running.client.get("/metrics")).text.splitlines()
    found = [line for line in lines if line.startswith("shoal_router:requests_total{")]
    return {line.split('status="')[1].split('"')[0]: float(line.split()[-1]) for line in found}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("how", ["server", "deadline", "text"])
async def test_a_stream_that_ends_in_an_error_is_no_success(run_router, caplog, how, kept):
    """The server says so in a frame, nobody goes on within the deadline, or it cannot go on by its text."""
    caplog.set_level(logging.INFO, "shoal")
    server = ScriptedServer(native=how != "text")
    running = await run_router(server)
    server.acts = [Act({"server": "error", "deadline": "lost", "text": "error"}[how], 2)]
    if how == "deadline":
        await until(lambda: running.backend(0).available)
        server.health = 503
    headers = {"x-shoal-deadline": "0.5", "x-request-id": "mine", **({"idempotency-key": "k"} if kept else {})}
    response = await running.complete(stream=True, headers=headers, **({"n": 2} if how == "text" else {}))
    assert response.status_code == 200
    error = [line.removeprefix("data: ") for line in response.text.split("\n") if '"error"' in line]
    assert len(error) == 1
    status = "500" if how == "text" else "503"
    assert await counted(running) == {status: 1.0}
    logged = [record.getMessage() for record in caplog.records if "mine" in record.getMessage()]
    assert any(line.startswith(f"POST /v1/completions {status} ") for line in logged), logged
    assert f"request mine: its stream ended with an error: {error[0]}" in logged


async def test_a_stream_that_ends_well_is_a_success(run_router, caplog):
    caplog.set_level(logging.INFO, "shoal")
    running = await run_router(ScriptedServer())
    assert events_of(await running.complete(stream=True, headers={"x-request-id": "mine"}))
    assert await counted(running) == {"200": 1.0}
    assert not [record for record in caplog.records if "ended with an error" in record.getMessage()]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None, "Text/JSON; x=y"])
async def test_server_and_router_say_the_same_of_a_wrong_content_type(run_router, content_type):
    running = await run_router(ScriptedServer())
    headers = {} if content_type is None else {"content-type": content_type}
    async with in_process_server() as server, served(server.app) as url:
        for path in ("/v1/completions", "/v1/chat/completions"):
            async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
                wanted = error_of(await client.post(path, content=b"{}", headers=headers), 415)
            found = error_of(await running.client.post(path, content=b"{}", headers=headers), 415)
            assert found == wanted and found["code"] == "unsupported_media_type"
