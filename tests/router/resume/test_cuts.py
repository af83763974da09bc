"""A stream that is cut at any byte, again and again, and goes on at either of two routers, reads like the whole one."""

from __future__ import annotations

import asyncio
import random

import aiohttp
import pytest

from tests.chaos.cases import Case, make_cases
from tests.chaos.client import AnswerFold, difference
from tests.chaos.harness import undisturbed
from tests.router.fakes.process import fake_servers
from tests.router.fakes.vocabulary import SAYABLE
from tests.router.resume.conftest import OneRouter, Received
from tests.router.scripted import until

NEVER, ALWAYS = 1000.0, 0.001


@pytest.fixture(scope="module")
def servers():
    with fake_servers("native", "native", tokens_per_second=300) as servers:
        yield servers


@pytest.fixture(scope="module")
def foreign_servers():
    with fake_servers("foreign", "foreign", tokens_per_second=300) as servers:
        yield servers


async def check(routers: list[OneRouter], cases: list[Case], url: str, seed: int) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as http:
        wanted = await undisturbed(http, url, cases, 16)
    slots = asyncio.Semaphore(8)

    async def one(case: Case) -> str | None:
        async with slots:
            return await _compare(routers, case, random.Random(f"{seed} {case.number}"), wanted[case.number])

    wrong = [found for found in await asyncio.gather(*map(one, cases)) if found]
    assert not wrong, "\n".join(wrong)


async def _compare(routers: list[OneRouter], case: Case, rng: random.Random, wanted: dict) -> str | None:
    key, received, fold = f"case-{case.number}", Received(), AnswerFold()
    if case.streams:
        found = await _stream(routers, case, key, rng, received)
        if found is not None:
            return f"case {case.number} {case.body}: {found}"
        events = received.events
    else:
        answers = [await one.send(key, path=case.path, body=case.body) for one in rng.sample(routers, 2)]
        bad = [answer.text for answer in answers if answer.status_code != 200]
        if bad:
            return f"case {case.number}: {bad}"
        contents = [answer.json() for answer in answers]
        assert contents[0]["id"] == contents[1]["id"] and contents[0]["choices"] == contents[1]["choices"]
        events = contents[:1]
    for event in events:
        fold.add(event)
    found = difference(fold.content(), wanted)
    return f"case {case.number} {case.body}: {found}" if found else None


async def _stream(routers: list[OneRouter], case: Case, key: str, rng: random.Random, received: Received) -> str | None:
    while not received.done:
        size = rng.choice((rng.randrange(1, 400), rng.randrange(1, 4000), 1 << 40))
        await asyncio.sleep(rng.choice((0, 0, rng.random() / 10)))
        _, response = await rng.choice(routers).read(received, key, size, path=case.path, body=case.body)
        if response.status_code != 200:
            return response.text
        error = received.error
        received.cut()
        if error is not None:
            return str(error)
    return None


@pytest.mark.parametrize("gather", [ALWAYS, 0.05, NEVER])
@pytest.mark.parametrize("ring", [1024, 1 << 20])
async def test_cuts_by_frames(run_routers, servers, monkeypatch, gather, ring):
    monkeypatch.setattr("shoal.router.resume.peers._GATHER_SECONDS", gather)
    urls = [server.url for server in servers]
    routers = await run_routers(*urls, resume_buffer_bytes=ring, golden_prompt="off")
    seed = round(gather * 1000) + ring
    await check(routers, make_cases("fake", 40, seed), urls[0], seed)


@pytest.mark.parametrize(("ring", "sync"), [(1024, True), (1 << 20, False)])
async def test_cuts_by_text(run_routers, foreign_servers, monkeypatch, ring, sync):
    # On a busy machine a peer may need longer than a client is to wait for it, and then it may not know the text.
    monkeypatch.setattr("shoal.router.resume.peers._LONGEST_WAIT", 30.0)
    urls = [server.url for server in foreign_servers]
    routers = await run_routers(*urls, resume_buffer_bytes=ring, golden_prompt="off", replicate_sync=sync)
    whole = [id_ for id_ in SAYABLE if id_ >= 260]
    cases = [case for case in make_cases("fake", 40, ring, by_text=whole) if case.streams]
    await check(routers, cases, urls[0], ring)


@pytest.mark.parametrize(
    "position",
    ["5.9999", "0.7", "9999.99999", "2.999s", ",,,,,3.3", "999999999.999999999", "t3.3.3.f", "t1.0.1e.f", "8.8l,8.8l"],
)
async def test_positions_that_no_event_had(run_routers, servers, position):
    """Somebody makes ids up: that is an error of the request, and of no server."""
    urls = [server.url for server in servers]
    one, other = await run_routers(*urls, golden_prompt="off")
    body = {"model": "fake", "prompt": "sea", "max_tokens": 12, "stream": True, "ignore_eos": True}
    await one.read(Received(), "k", path="/v1/completions", body=body)
    await until(lambda: [kept.ended for kept in other.router.store] == [True])
    for router in (one, other):
        received = Received()
        received.ids = [f"k:{position}"]
        _, response = await asyncio.wait_for(router.read(received, "k", body=body), 20)
        assert response.status_code == 200 and (received.error is not None or received.done)
        assert all(backend.accepts(router.router.pool.clock()) for backend in router.router.pool)
        back = Received()
        await router.read(back, "k", body=body)
        assert back.done, back.error
