"""Clients that come back: to the router that answers them, or to its peer. Servers are scripted, routers are real."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref

import pytest

from tests.router.conftest import error_of
from tests.router.resume.conftest import Received
from tests.router.scripted import Act, ScriptedServer, until

WHOLE = " 0 1 2 3 4"


async def until_known(one, num=1):
    await until(lambda: len(one.router.store) == num)


async def cut_after(one, server, received, num_tokens, key="k", **fields):
    """Read a stream until that many tokens have come; then the connection breaks while the server pauses."""
    async with one.streamed(key, received.last_id, **fields) as response:
        assert response.status_code == 200
        async for piece in response.aiter_raw():
            received.feed(piece)
            if len(received.events) >= num_tokens:
                break
    received.cut()


@pytest.mark.parametrize("native", [True, False])
async def test_a_stream_says_where_it_is(run_routers, native):
    (one,) = await run_routers(ScriptedServer(native), num_routers=1)
    received = Received()
    _, response = await one.read(received, "k")
    assert received.text == WHOLE and received.done
    assert response.headers["idempotency-key"] == "k" and response.headers["content-type"].startswith("text/event-")
    marks = ["1.2", "2.4", "3.6", "4.8", "5.10l"] if native else ["t1.2.1", "t2.4.2", "t3.6.3", "t4.8.4", "t5.10.5e"]
    run = "" if native else received.ids[0].removeprefix("k:t1.2.1")
    assert received.ids == [f"k:{mark}{run}" for mark in marks] and (native or len(run) > 1)


async def test_what_is_not_kept_says_nothing(run_routers):
    server = ScriptedServer()
    one, other = await run_routers(server)
    async with one.streamed(None) as response:
        assert b"id:" not in await response.aread() and "idempotency-key" not in response.headers
    assert len(one.router.store) == len(other.router.store) == 0


async def test_a_key_is_made_for_those_who_ask(run_routers):
    one, _ = await run_routers(ScriptedServer())
    response = await one.send(None, headers={"x-shoal-resumable": "true"})
    key = response.headers["idempotency-key"]
    again = await one.send(key)
    assert again.json() == response.json() and again.headers["idempotency-key"] == key


@pytest.mark.parametrize("num_tokens", [1, 3, 5])
@pytest.mark.parametrize("native", [True, False])
async def test_coming_back_to_the_same_router(run_routers, native, num_tokens):
    server = ScriptedServer(native)
    (one,) = await run_routers(server, num_routers=1)
    received = Received()
    server.pause = 0.01
    await cut_after(one, server, received, num_tokens)
    await one.read(received, "k")
    assert received.text == WHOLE and received.done
    assert len(server.requests) == 1, "the request went on while its client was away"
    assert (await one.metrics())["shoal_router:requests_resumed_total"] == 1


@pytest.mark.parametrize("num_tokens", [1, 3, 5])
@pytest.mark.parametrize("native", [True, False])
async def test_coming_back_to_another_router(run_routers, native, num_tokens):
    server = ScriptedServer(native)
    one, other = await run_routers(server, replicate_sync=not native)
    received = Received()
    server.pause = 0.01
    await cut_after(one, server, received, num_tokens)
    await one.kill()
    await other.read(received, "k")
    assert received.text == WHOLE and received.done
    metrics = await other.metrics()
    assert metrics["shoal_router:requests_taken_over_total"] == 1
    if native:
        first, second = server.requests[0], server.requests[-1]
        assert (first.seed, first.created, first.request_id) == (second.seed, second.created, second.request_id)
        assert second.prompts == [[7, 8, 9]]


async def test_the_peer_knows_of_a_request_before_its_first_byte(run_routers):
    server = ScriptedServer()
    one, other = await run_routers(server)
    async with one.streamed("k") as response:
        await anext(response.aiter_raw())
        (kept,) = other.router.store
        assert (kept.key, kept.owner) == ("k", one.router.peers.name)
        assert kept.journal.prompts == [[7, 8, 9]] and kept.journal.answers[0].token_ids[:1] == [0]


async def test_with_synchronous_replication_the_peer_knows_every_token(run_routers):
    server = ScriptedServer()
    one, other = await run_routers(server, replicate_sync=True)
    received = Received()
    async with one.streamed("k") as response:
        async for piece in response.aiter_raw():
            received.feed(piece)
            (kept,) = other.router.store
            assert len(kept.journal.answers[0].token_ids) >= len(received.events)
    assert received.text == WHOLE


async def test_a_tail_that_the_peer_lacks_is_generated_again(run_routers, monkeypatch):
    monkeypatch.setattr("shoal.router.resume.peers._GATHER_SECONDS", 1000.0)
    server = ScriptedServer()
    one, other = await run_routers(server)
    received = Received()
    server.pause = 0.01
    await cut_after(one, server, received, 4)
    (kept,) = other.router.store
    assert len(kept.journal.answers[0].token_ids) < 4
    await one.kill()
    await other.read(received, "k")
    assert received.text == WHOLE and received.done and len(received.events) == 5


async def test_the_peer_knows_more_than_the_client(run_routers):
    """What the client did not get is sent again, from exactly where it is."""
    server = ScriptedServer()
    one, other = await run_routers(server, replicate_sync=True)
    received = Received()
    await one.read(received, "k")
    await one.kill()
    back = Received()
    back.ids = received.ids[:2]
    await other.read(back, "k")
    assert back.text == " 2 3 4" and back.done
    assert server.requests[-1].answers[0].token_ids == [0, 1] and server.requests[-1].answers[0].finish_reason is None


@pytest.mark.parametrize("stream", [True, False])
async def test_the_same_key_without_an_id_gets_all_of_it(run_routers, stream):
    server = ScriptedServer()
    one, other = await run_routers(server)
    first = await one.send("k", stream=stream)
    assert (await one.send("k", stream=stream)).content == first.content
    assert len(server.requests) == 1
    await until(lambda: [kept.ended for kept in other.router.store] == [True])
    assert (await other.send("k", stream=stream)).content == first.content
    journal = server.requests[-1].answers
    assert (journal == []) == stream, "an answer that comes whole needs no token again"


async def test_two_wait_for_the_same_plain_answer(run_routers):
    server = ScriptedServer()
    (one,) = await run_routers(server, num_routers=1)
    server.gate.clear()
    answers = [asyncio.create_task(one.send("k")) for _ in range(3)]
    await until(lambda: [len(kept.readers) for kept in one.router.store] == [3])
    server.gate.set()
    contents = [(await answer).content for answer in answers]
    assert len(set(contents)) == 1 and len(server.requests) == 1


async def test_a_second_reader_takes_a_stream_over(run_routers):
    server = ScriptedServer()
    (one,) = await run_routers(server, num_routers=1)
    server.pause = 0.02
    first, second = Received(), Received()
    reading = asyncio.create_task(one.read(first, "k"))
    await until(lambda: len(first.events) >= 2)
    second.ids = first.ids[:1]
    await one.read(second, "k")
    await reading
    assert first.error["code"] == "taken_over" and not first.done
    assert second.text == " 1 2 3 4" and second.done


async def test_a_key_is_of_one_request_only(run_routers):
    one, other = await run_routers(ScriptedServer())
    await one.send("k")
    for router in (one, other):
        error = error_of(await router.send("k", prompt="else"), 422)
        assert error["code"] == "idempotency_key_reused" and "'k'" in error["message"]
    same = {"max_tokens": 5, "prompt": "count", "model": "m"}
    assert (await one.send("k", body=same)).status_code == 200, "the order of fields means nothing"
    assert (await one.send("other", prompt="else")).status_code == 200


async def test_what_nobody_knows_cannot_be_resumed(run_routers):
    server = ScriptedServer()
    one, _ = await run_routers(server)
    response = await one.send("k", "k:3.6", stream=True)
    assert error_of(response, 409)["code"] == "not_resumable" and server.requests == []


@pytest.mark.parametrize(
    ("key", "last_id", "message"),
    [
        ("a b", None, "visible ASCII"),
        ("", None, "visible ASCII"),
        ("k" * 256, None, "1 to 255"),
        ("k", "other:1.2", "is of the request 'other'"),
        ("k", "k", "no id of an event"),
        ("k", "k:1", "no position"),
        ("k", "k:1.2.3", "no position"),
        ("k", "k:-1.2", "no position"),
    ],
)
async def test_headers_that_are_wrong(run_routers, key, last_id, message):
    (one,) = await run_routers(ScriptedServer(), num_routers=1)
    assert message in error_of(await one.send(key, last_id, stream=True), 400)["message"]


async def test_an_id_is_of_a_stream(run_routers):
    (one,) = await run_routers(ScriptedServer(), num_routers=1)
    assert "stream" in error_of(await one.send("k", "k:1.2"), 400)["message"]


async def test_keys_are_of_those_who_sent_them(run_routers):
    server = ScriptedServer()
    one, other = await run_routers(server, keys=[{"key": "one", "name": "a"}, {"key": "two", "name": "b"}])
    for name in ("one", "two", "one"):
        await one.send("k", headers={"authorization": f"Bearer {name}"}, prompt=f"count {name}")
    assert {kept.name for kept in one.router.store} == {("a", "k"), ("b", "k")} and len(server.requests) == 2
    await until_known(other, 2)
    assert {kept.name for kept in other.router.store} == {("a", "k"), ("b", "k")}


async def test_secrets_that_servers_check_tell_clients_apart_but_are_not_kept(run_routers):
    one, other = await run_routers(ScriptedServer())
    for secret in ("secret-1", "secret-2"):
        await one.send("k", headers={"authorization": f"Bearer {secret}"}, prompt=secret)
    scopes = [kept.name[0] for kept in one.router.store]
    assert len(set(scopes)) == 2 and not any("secret" in scope for scope in scopes)
    response = await other.send("k", headers={"authorization": "Bearer secret-2"}, prompt="secret-2")
    assert response.status_code == 200
    assert (await other.metrics())["shoal_router:requests_taken_over_total"] == 1


async def test_a_client_that_does_not_come_back(run_routers):
    server = ScriptedServer()
    one, other = await run_routers(server, resume_seconds=0.3)
    async with one.streamed("k", max_tokens=50) as response:
        await anext(response.aiter_raw())
        server.gate.clear()
    assert server.num_open == 1
    await asyncio.wait_for(server.disconnected.wait(), 10)
    await until_known(one, 0)
    await until_known(other, 0)


async def test_what_has_ended_is_kept_for_a_while(run_routers):
    one, other = await run_routers(ScriptedServer(), resume_seconds=0.3)
    await one.send("k")
    assert len(one.router.store) == 1
    await until_known(one, 0)
    await until_known(other, 0)


async def test_a_router_that_is_not_heard_of_takes_its_requests_along(run_routers):
    one, other = await run_routers(ScriptedServer(), resume_seconds=1.5)
    await one.send("k")
    await until_known(other)
    await one.kill()
    await until_known(other, 0)


async def test_nothing_is_kept_when_the_time_is_zero(run_routers):
    server = ScriptedServer()
    (one,) = await run_routers(server, num_routers=1, resume_seconds=0)
    for _ in range(2):
        response = await one.send("k", stream=True)
        assert b"id:" not in response.content
    assert len(server.requests) == 2 and len(one.router.store) == 0


async def test_bytes_that_the_ring_has_lost_are_rendered_again(run_routers):
    server = ScriptedServer()
    server.padding = "x" * 300
    (one,) = await run_routers(server, num_routers=1, resume_buffer_bytes=1024)
    received = Received()
    await one.read(received, "k", max_tokens=20)
    back = Received()
    back.ids = received.ids[:3]
    await one.read(back, "k", max_tokens=20)
    assert back.events == received.events[3:] and back.done
    metrics = await one.metrics()
    assert metrics["shoal_router:requests_rerun_total"] == 1 and len(server.requests) == 2
    assert server.requests[1].answers[0].token_ids == [0, 1, 2]


async def test_a_slow_client_holds_the_server_up(run_routers):
    server = ScriptedServer()
    server.padding = "x" * 20_000
    (one,) = await run_routers(server, num_routers=1, resume_buffer_bytes=1024)
    async with one.streamed("k", max_tokens=2000) as response:
        pieces = response.aiter_raw()
        await anext(pieces)
        before = -1
        while before != server.num_sent:  # until nothing moves any more
            before = server.num_sent
            await asyncio.sleep(0.3)
        assert server.num_sent < 2000
        assert one.router.store.num_bytes < 2_000_000
    assert server.num_sent < 2000 or server.num_open == 0


async def test_memory_is_bounded_under_abandoned_requests(run_routers):
    server = ScriptedServer()
    server.padding = "x" * 1000
    one, other = await run_routers(
        server, resume_max_requests=20, resume_max_bytes=100_000, resume_buffer_bytes=4096, golden_prompt="off"
    )
    for number in range(120):
        async with one.streamed(f"k{number}", max_tokens=10) as response:
            await anext(response.aiter_raw())
    for router in (one, other):
        await until(lambda router=router: len(router.router.store) <= 20)
        await until(lambda router=router: router.router.store.num_bytes <= 100_000)
        assert len(router.router.store) > 0
    metrics = await one.metrics()
    assert metrics["shoal_router:kept_requests_dropped_total"] >= 100
    assert metrics["shoal_router:kept_requests"] == len(one.router.store)
    await until(lambda: server.num_open <= 20)


async def test_a_request_that_nobody_could_take_may_be_tried_again(run_routers):
    server = ScriptedServer()
    one, other = await run_routers(server, deadline=0.2)
    server.acts = [Act(status=503)] * 50
    error_of(await one.send("k", stream=True), 503)
    server.acts = []
    received = Received()
    await one.read(received, "k")
    assert received.text == WHOLE


async def test_a_stream_that_found_no_server_goes_on_later(run_routers):
    server = ScriptedServer()
    one, other = await run_routers(server, deadline=0.3)
    server.acts = [Act("moved", 2)] + [Act(status=503)] * 100
    received = Received()
    await one.read(received, "k")
    assert received.error["code"] == "unavailable" and received.text == " 0 1"
    received.cut()
    server.acts = []
    await other.read(received, "k")
    assert received.text == WHOLE and received.done


async def test_a_request_that_ends_engines_is_not_tried_again(run_routers):
    servers = [ScriptedServer() for _ in range(3)]
    one, other = await run_routers(*servers)
    for server in servers:
        server.acts = [Act("lost", 1)] * 9
    error = error_of(await one.send("k"), 500)
    assert error["code"] == "query_of_death"
    num = sum(len(server.requests) for server in servers)
    await until(lambda: [kept.failure is not None for kept in other.router.store] == [True])
    assert [kept.journal.num_crashes for kept in other.router.store] == [3]
    for router in (one, other):
        assert error_of(await router.send("k"), 500) == error
    assert sum(len(server.requests) for server in servers) == num


async def test_an_error_of_the_request_is_said_again(run_routers):
    server = ScriptedServer()
    (one,) = await run_routers(server, num_routers=1)
    server.acts = [Act(status=400)]
    assert error_of(await one.send("k"), 400) == error_of(await one.send("k"), 400)
    assert len(server.requests) == 1


async def test_a_split(run_routers):
    """Both routers live, the client goes from one to the other and back."""
    server = ScriptedServer()
    one, other = await run_routers(server)
    received = Received()
    server.pause = 0.01
    await cut_after(one, server, received, 2)
    await cut_after(other, server, received, 4)
    await one.read(received, "k")
    assert received.text == WHOLE and received.done and len(received.events) == 5


async def test_a_peer_that_is_away_delays_nothing_and_is_told_when_it_is_back(run_routers):
    server = ScriptedServer()
    one, other = await run_routers(server)
    link = one.router.peers.links[0]
    await until(lambda: link.num_messages > 0)
    real, link.url = link.url, "http://127.0.0.1:1"
    await until(lambda: link.why_down is not None)
    await one.send("k")
    (peer,) = (await one.http.get("/router/backends")).json()["peers"]
    assert not peer["up"] and "no connection" in peer["why_down"]
    assert (await one.metrics())['shoal_router:peer_up{peer="http://127.0.0.1:1"}'] == 0
    assert len(other.router.store) == 0
    link.url = real
    await until_known(other)
    assert (await other.send("k")).status_code == 200


@pytest.mark.parametrize("how", ["away", "on its way", "no reply"])
async def test_a_peer_forgets_what_went_while_it_could_not_be_told(run_routers, monkeypatch, how):
    one, other = await run_routers(ScriptedServer())
    link = one.router.peers.links[0]
    await until(lambda: link.num_messages > 0)
    arrived, go_on, post = asyncio.Event(), asyncio.Event(), link._post

    async def post_and_wait(path, data):
        reply = await post(path, data)
        if len(other.router.store) and not arrived.is_set():
            arrived.set()
            await go_on.wait()
            if how == "no reply":
                raise OSError("the reply was lost")
        return reply

    if how == "away":
        await one.send("k")
        await until_known(other)
        real, link.url = link.url, "http://127.0.0.1:1"
        await until(lambda: link.why_down is not None)
    else:
        monkeypatch.setattr(link, "_post", post_and_wait)
        asking = asyncio.create_task(one.send("k"))
        await arrived.wait()
        await asking
    (kept,) = one.router.store
    one.router.store.drop(kept)
    assert len(other.router.store) == 1
    go_on.set()
    if how == "away":
        link.url = real
    await until_known(other, 0)


async def test_a_peer_that_stays_away_costs_no_memory(run_routers):
    one, _ = await run_routers(ScriptedServer(), resume_seconds=0.1)
    link = one.router.peers.links[0]
    link.url = "http://127.0.0.1:1"
    await until(lambda: link.why_down is not None)
    await one.send("k")
    held = weakref.ref(*one.router.store)
    assert link.lag(time.monotonic()) > 0
    await until_known(one, 0)
    await until(lambda: gc.collect() >= 0 and held() is None)


async def test_a_peer_that_has_forgotten_is_told_all_of_it(run_routers):
    server = ScriptedServer()
    one, other = await run_routers(server)
    received = Received()
    server.pause = 0.02
    reading = asyncio.create_task(one.read(received, "k"))
    await until(lambda: len(received.events) >= 2)
    for kept in tuple(other.router.store):
        other.router.store.silently_drop(kept)
    await reading
    await until(lambda: [kept.ended for kept in other.router.store] == [True])
    (kept,) = other.router.store
    assert kept.journal.answers[0].token_ids == [0, 1, 2, 3, 4]


async def test_routers_show_each_other_a_key(run_routers):
    one, other = await run_routers(ScriptedServer(), peer_key="between-us", admin_key="admin")
    await one.send("k")
    await until_known(other)
    for path, what in (("/router/replicate", "no batch"), ("/router/claim", "no claim")):
        for headers in ({}, {"authorization": "Bearer admin"}):
            error_of(await one.http.post(path, content=b"", headers=headers), 401)
        response = await one.http.post(path, content=b"\x80", headers={"authorization": "Bearer between-us"})
        assert what in error_of(response, 400)["message"]


async def test_a_router_that_ends_tells_its_last_news(run_routers):
    server = ScriptedServer()
    one, other = await run_routers(server)
    received = Received()
    server.pause = 0.02
    reading = asyncio.create_task(one.read(received, "k", max_tokens=30))
    await until(lambda: len(received.events) >= 3)
    one.router.begin_drain()
    one.router.end_requests()
    await reading
    assert received.error["code"] == "unavailable"
    received.cut()
    await other.read(received, "k", max_tokens=30)
    assert received.text == "".join(f" {number}" for number in range(30)) and received.done
