from __future__ import annotations

import logging

import pytest

from shoal.config.router_settings import BackendSpec, GoldenSpec
from shoal.router.golden import GoldenAnswer, GoldenJudge, read_golden
from tests.router.conftest import error_of
from tests.router.scripted import ScriptedServer, until

SPEC = GoldenSpec(prompt="golden?")
RIGHT, WRONG = GoldenAnswer("right", (1, 2)), GoldenAnswer("wrong", (1, 3))


def test_the_majority_of_those_that_start_together_counts():
    judge = GoldenJudge(SPEC, ["a", "b", "c"])
    judge.vote("a", {"m": WRONG})
    assert judge.verdict("a") is None
    judge.vote("b", {"m": RIGHT})
    assert judge.verdict("b") is None
    judge.vote("c", {"m": RIGHT})
    assert judge.verdict("b") == judge.verdict("c") == (True, "")
    right, why = judge.verdict("a")
    assert not right and "'wrong' [1, 3]; 'right' [1, 2] is expected" in why


def test_a_tie_is_told_and_the_first_in_the_list_counts(caplog):
    judge = GoldenJudge(SPEC, ["a", "b"])
    with caplog.at_level(logging.ERROR, "shoal"):
        judge.vote("b", {"m": WRONG})
        judge.vote("a", {"m": RIGHT})
    assert judge.verdict("a")[0] and not judge.verdict("b")[0]
    assert "differently without a majority: a: 'right' [1, 2]; b: 'wrong' [1, 3]" in caplog.text


def test_one_that_does_not_come_is_not_waited_for():
    judge = GoldenJudge(SPEC, ["a", "b", "c"])
    judge.give_up("c")
    judge.vote("b", {"m": RIGHT})
    assert judge.verdict("b") is None
    judge.give_up_all()
    assert judge.verdict("b")[0]
    judge.vote("a", {"m": WRONG})
    assert not judge.verdict("a")[0], "who comes later does not change what is right"


def test_models_are_told_apart_and_ids_are_compared_where_there_are_any():
    judge = GoldenJudge(SPEC)
    judge.vote("a", {"m": RIGHT, "n": WRONG})
    judge.vote("b", {"m": GoldenAnswer("right"), "n": WRONG})
    judge.vote("c", {"m": GoldenAnswer("right", (1, 9))})
    assert judge.verdict("a")[0] and judge.verdict("b")[0] and not judge.verdict("c")[0]


def test_the_settings_may_know_the_answer():
    judge = GoldenJudge(GoldenSpec(prompt="golden?", text="right"), ["a", "b"])
    judge.vote("a", {"m": WRONG})
    judge.vote("b", {"m": RIGHT})
    assert not judge.verdict("a")[0] and judge.verdict("b")[0]


def test_what_was_right_stays_so_while_one_server_is_left():
    judge = GoldenJudge(SPEC)
    judge.vote("a", {"m": RIGHT})
    judge.vote("b", {"m": RIGHT})
    judge.forget("a")
    judge.withdraw("b")
    judge.vote("b", {"m": WRONG})
    assert not judge.verdict("b")[0]
    judge.forget("b")
    judge.vote("c", {"m": WRONG})
    assert judge.verdict("c")[0]


def test_servers_that_were_right_and_all_say_something_else_have_new_weights():
    judge = GoldenJudge(SPEC)
    for key in ("a", "b"):
        judge.vote(key, {"m": RIGHT})
        assert judge.verdict(key)[0]
    judge.vote("bad", {"m": GoldenAnswer("bad")})
    assert not judge.verdict("bad")[0]
    judge.withdraw("a")
    judge.vote("a", {"m": WRONG})
    assert not judge.verdict("a")[0], "b contradicts it"
    judge.withdraw("b")
    assert not judge.verdict("a")[0] and not judge.verdict("bad")[0], "nobody who never was right may decide"
    judge.forget("bad")
    assert judge.verdict("a")[0]
    judge.vote("b", {"m": WRONG})
    assert judge.verdict("b")[0]
    judge.withdraw("b")
    judge.vote("b", {"m": RIGHT})
    assert not judge.verdict("b")[0]


def test_reading():
    assert read_golden(b'{"choices":[{"text":"x","token_ids":[1]}]}') == GoldenAnswer("x", (1,))
    assert read_golden(b'{"choices":[{"text":"x","token_ids":null}]}') == GoldenAnswer("x")
    for body in (b"{}", b'{"choices":[]}', b"no"):
        with pytest.raises(ValueError):
            read_golden(body)


async def test_a_server_that_answers_otherwise_stays_out(run_router, caplog):
    servers = [ScriptedServer(golden="odd"), ScriptedServer(), ScriptedServer()]
    with caplog.at_level(logging.ERROR, "shoal"):
        running = await run_router(*servers, wait=False)
        await running.until_in(1, 2)
        await until(lambda: "odd" in (running.backend(0).why_out(0) or ""))
    assert "answers the golden prompt 'golden?' of m with 'odd'; 'right' is expected" in caplog.text
    for _ in range(4):
        assert (await running.complete()).status_code == 200
    assert servers[0].requests == []


async def test_without_golden_prompt(run_router):
    running = await run_router(ScriptedServer(golden="odd"), ScriptedServer(), golden_prompt="off")
    assert [server.num_golden for server in running.servers] == [0, 0]


async def test_a_server_that_comes_later(run_router):
    running = await run_router(ScriptedServer(), more=[BackendSpec(url="http://127.0.0.1:1")], wait=False)
    await running.until_in(0)
    assert (await running.complete()).status_code == 200
    error_of(await running.complete(model="other"), 404)


async def test_a_server_whose_engine_was_restarted_is_asked_again(run_router):
    """/livez says 200 all the while."""
    running = await run_router(ScriptedServer(), ScriptedServer())
    server = running.servers[0]
    server.health = server.ready = 503
    await until(lambda: not running.backend(0).health.admitting)
    before, server.golden = server.num_golden, "odd"
    server.health = server.ready = 200
    await until(lambda: "odd" in (running.backend(0).why_out(0) or ""))
    assert server.num_golden == before + 1 and not running.backend(0).available


async def test_a_server_that_made_no_progress_for_a_while_is_not_asked_again(run_router):
    running = await run_router(ScriptedServer())
    (server,) = running.servers
    server.health = 503
    await until(lambda: not running.backend(0).health.progressing)
    server.health = 200
    await running.until_in()
    assert server.num_golden == 1
