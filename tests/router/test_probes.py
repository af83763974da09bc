"""Many servers are looked at side by side, and not all at once where they are very many."""

from __future__ import annotations

import asyncio
import time

import pytest

from shoal.config.router_settings import BackendSpec
from shoal.router import probes
from tests.router.scripted import ScriptedServer, served, until


async def hang(reader, writer):
    """Takes what comes, and says nothing."""
    try:
        while await reader.read(65536):
            pass
    finally:
        writer.close()


async def test_servers_that_hang_are_noticed_side_by_side(run_router):
    """Twelve that hang and one that is well, each probe with a limit of a second."""
    silent = [await asyncio.start_server(hang, "127.0.0.1", 0) for _ in range(12)]
    try:
        specs = [BackendSpec(url=f"http://127.0.0.1:{each.sockets[0].getsockname()[1]}") for each in silent]
        well = ScriptedServer()
        began = time.monotonic()
        running = await run_router(well, more=specs, wait=False, stall_timeout=1.0)
        backends = [running.router.pool.get(spec.url) for spec in specs]
        await until(lambda: running.backend(0).health.good)
        assert time.monotonic() - began < 1, "the one that is well waits for none that hang"
        await until(lambda: all("within 1 s" in backend.health.why for backend in backends))
        assert time.monotonic() - began < 4, "one after the other would take twelve seconds"
    finally:
        for each in silent:
            each.close()


async def test_servers_that_are_suspected_at_once_are_asked_side_by_side(run_router):
    servers = [ScriptedServer() for _ in range(6)]
    running = await run_router(*servers, probe_interval=60)
    for server in servers:
        server.health = 503
    began = time.monotonic()
    for backend in running.router.pool:
        backend.suspect()
    await until(lambda: not any(backend.health.good for backend in running.router.pool))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("num_turns", range(8))
async def test_a_watch_ends_though_a_server_is_suspected_at_that_moment(run_router, num_turns):
    """num_turns: of the event loop, between the one and the other."""
    running = await run_router(ScriptedServer(), probe_interval=60)
    backend = running.backend(0)
    await until(lambda: backend.entered)
    await asyncio.sleep(0.05)  # it waits for its next probe
    backend.suspect()
    for _ in range(num_turns):
        await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await running.router._monitor.remove([backend])


async def test_no_more_probes_at_a_time_than_the_bound(run_router, monkeypatch):
    monkeypatch.setattr(probes, "_MOST_AT_ONCE", 3)
    num_now, most = 0, 0

    async def app(scope, receive, send):
        nonlocal num_now, most
        num_now += 1
        most = max(most, num_now)
        await asyncio.sleep(0.02)
        num_now -= 1
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with served(app) as url:
        specs = [BackendSpec(url=f"{url}/{number}") for number in range(12)]
        running = await run_router(more=specs, wait=False)
        await until(lambda: all(backend.was_asked for backend in running.router.pool))
    assert most == 3
