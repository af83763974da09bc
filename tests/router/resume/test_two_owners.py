"""A client of a text goes to and fro between two routers that live, whatever they have told each other of it."""

from __future__ import annotations

import asyncio

import pytest

from shoal.router.resume.replication import Claim
from tests.router.resume.conftest import Received
from tests.router.scripted import ScriptedServer, until

NUM = 12
WHOLE = "".join(f" {number}" for number in range(NUM))


@pytest.fixture
async def pair(run_routers):
    """Two routers, neither of which hears anything of the other one's requests beyond their first bytes; a server."""
    server = ScriptedServer(native=False)
    server.pause = 0.02
    return *await run_routers(server), server


@pytest.fixture(autouse=True)
def silence(monkeypatch):
    monkeypatch.setattr("shoal.router.resume.peers._GATHER_SECONDS", 1000.0)


def kept_of(one):
    (kept,) = one.router.store
    return kept


async def read_some(one, received, num_events):
    """So many events in all; then the connection is cut."""
    async with one.streamed("k", received.last_id, max_tokens=NUM) as response:
        assert response.status_code == 200
        async for piece in response.aiter_raw():
            received.feed(piece)
            if len(received.events) >= num_events:
                break
    assert received.error is None, received.error
    received.cut()


async def test_what_only_the_other_one_has_is_asked_for(pair):
    one, other, server = pair
    received = Received()
    await read_some(one, received, 5)
    assert kept_of(other).text.num_characters < 10 and kept_of(one).owner is None
    await read_some(other, received, 6)
    assert kept_of(one).owner == other.router.peers.name and not kept_of(one).is_running
    assert server.requests[-1]["prompt"] == "count 0 1 2 3 4"
    await read_some(one, received, 8)
    await other.read(received, "k", max_tokens=NUM)
    assert received.text == WHOLE and received.done and len(received.events) == NUM
    assert (await other.metrics())["shoal_router:requests_taken_over_total"] == 2
    await until(lambda: server.num_open == 0, "no run is left over")


async def test_a_connection_that_nobody_has_left_is_taken_from(pair):
    """The client goes to the other router while the first one still takes it for there."""
    one, other, server = pair
    first, received = Received(), Received()
    reading = asyncio.create_task(one.read(first, "k", max_tokens=NUM))
    await until(lambda: len(first.events) >= 4)
    received.ids, received.events = first.ids[:4], first.events[:4]
    await other.read(received, "k", max_tokens=NUM)
    await reading
    assert first.error["code"] == "taken_over"
    assert received.text == WHOLE and received.done


async def test_both_go_on_and_the_client_comes_back(pair):
    """The first router does not hear that the other one took over: each has a text of its own."""
    one, other, server = pair
    received = Received()
    await read_some(one, received, 1)
    link = other.router.peers.links[0]
    link.url, real = "http://127.0.0.1:1", link.url
    await until(lambda: link.why_down is not None)
    await until(lambda: kept_of(other).text.num_events > 0)
    await read_some(other, received, 4)
    assert kept_of(one).owner is None and kept_of(other).owner is None
    assert kept_of(one).text.runs[-1] != kept_of(other).text.runs[-1]
    ours = kept_of(one).text.runs[-1].name
    await until(lambda: kept_of(one).text.num_events >= 4, "a text of the same length, which the client has not")
    await read_some(one, received, 6)
    assert kept_of(other).owner == one.router.peers.name and ours not in received.last_id
    link.url = real
    await one.read(received, "k", max_tokens=NUM)
    assert received.text == WHOLE and received.done and len(received.events) == NUM


async def test_what_nobody_has_changes_nothing(pair):
    one, other, server = pair
    received = Received()
    await read_some(one, received, 3)
    task = kept_of(one).task
    for router in (one, other):
        lost = Received()
        lost.ids = [received.ids[-1].rpartition(".")[0] + ".f00"]
        await router.read(lost, "k", max_tokens=NUM)
        assert lost.error["code"] == "cannot_resume" and "no other router" in lost.error["message"]
    assert kept_of(one).task is task and kept_of(other).owner == one.router.peers.name
    await one.read(received, "k", max_tokens=NUM)
    assert received.text == WHOLE and received.done and len(server.requests) == 1


async def test_what_was_given_and_not_gone_on_with(run_routers):
    """The claim came too late: it is still here for the client, and goes everywhere when that does not come."""
    server = ScriptedServer(native=False)
    server.pause = 0.02
    one, other = await run_routers(server, resume_seconds=2)
    received = Received()
    await read_some(one, received, 4)
    kept, _, position = kept_of(one), *received.last_id.split(":")
    claim = Claim(1, other.router.peers.name, *kept.name, kept.digest, position)
    assert (await one.router.entrance.give(claim)).news.text.num_characters >= 8
    assert not kept.is_running and kept.owner is None
    await read_some(one, received, 6)
    assert WHOLE.startswith(received.text) and kept.owner is None
    await one.router.entrance.give(claim)
    await until(lambda: len(one.router.store) == len(other.router.store) == 0)
    assert server.num_open == 0


async def test_a_router_that_is_gone_gives_nothing(pair):
    one, other, _ = pair
    received = Received()
    await read_some(one, received, 5)
    await one.kill()
    await other.read(received, "k", max_tokens=NUM)
    assert received.error["code"] == "cannot_resume"
    received.cut()
