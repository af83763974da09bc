"""The link between router and replica: what each of its faults looks like to who sends over it."""

from __future__ import annotations

import asyncio
import contextlib

import aiohttp
import pytest

from tests.chaos.link import Link

MARKER = "chaos-0123456789ab"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n0123456789"


@contextlib.asynccontextmanager
async def linked(delay: float = 0.0):
    """A link to a server that answers every request after a while."""
    num_asked, handlers = 0, set()

    async def answer(reader, writer):
        nonlocal num_asked
        handlers.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if b"content-length:" in line]
                await reader.readexactly(int(lengths[0]) if lengths else 0)
                num_asked += 1
                await asyncio.sleep(delay)
                writer.write(ANSWER)
                await writer.drain()
        writer.close()
        handlers.discard(writer)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    link = Link(server.sockets[0].getsockname()[1])
    await link.start()
    timeout = aiohttp.ClientTimeout(total=10)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as http:
        yield link, http, lambda: num_asked
    await link.close()
    server.close()
    while handlers:
        await asyncio.sleep(0.005)


async def post(http, link, seconds=10.0):
    async with http.post(link.url, data=MARKER, timeout=aiohttp.ClientTimeout(seconds)) as response:
        return response.status, await response.read()


async def test_it_shows_what_it_carries():
    async with linked(delay=0.3) as (link, http, _):
        asking = asyncio.create_task(post(http, link))
        while not link.carried:
            await asyncio.sleep(0.005)
        assert link.carried == {MARKER} == set(link.seen)
        assert await asking == (200, b"0123456789")
        async with http.get(link.url) as response:
            assert response.status == 200
        assert not link.carried


async def test_error_and_hang_strike_requests_but_not_probes():
    async with linked() as (link, http, num_asked):
        link.set_mode("error")
        status, body = await post(http, link)
        assert status == 500 and b"on purpose" in body
        async with http.get(link.url) as response:
            assert response.status == 200
        link.set_mode("hang")
        with pytest.raises(asyncio.TimeoutError):
            await post(http, link, 0.2)
        assert num_asked() == 1 and link.num_struck == 2
        link.set_mode("open")
        assert (await post(http, link))[0] == 200


async def test_half_an_event():
    async with linked() as (link, http, _):
        link.set_mode("half_event")
        with pytest.raises(aiohttp.ClientError):
            await post(http, link)


async def test_a_dropped_link_says_nothing_and_a_reset_one_says_so():
    async with linked() as (link, http, num_asked):
        link.set_mode("dropped")
        with pytest.raises(asyncio.TimeoutError):
            await post(http, link, 0.2)
        assert num_asked() == 0
        link.set_mode("open")
        assert (await post(http, link))[0] == 200
        link.set_mode("reset")
        with pytest.raises(aiohttp.ClientError):
            await post(http, link)
