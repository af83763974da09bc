"""The quick form of the chaos runs: each fault once, with fake engines; `scripts/chaos` is the long form."""

from __future__ import annotations

import asyncio
import random
import shutil

import aiohttp
import pytest

from tests.chaos.cases import make_cases
from tests.chaos.faults import ALL_KINDS, ROUTER_KINDS
from tests.chaos.harness import Plan, Result, run, scene, undisturbed
from tests.chaos.load import Load
from tests.router.fakes.vocabulary import DEADLY

# Silence is noticed sooner than by default, so that the faults take seconds together.
QUICK = ("--stall-timeout", "2", "--probe-interval", "0.2")


async def run_and_check(plan: Plan) -> Result:
    lines: list[str] = []
    result = await run(plan, tell=lines.append)
    assert result.ok, "\n".join([*lines, result.summary()])
    assert len(result.records) == plan.num_faults and all(record.checked for record in result.records)
    return result


async def test_the_harness_finds_nothing_wrong_with_a_server_alone():
    await run_and_check(Plan(num_faults=2, kinds=("calm",), num_replicas=1, with_router=False, pause=0.5, num_cases=64))


async def test_the_harness_finds_what_a_fault_does_without_a_router():
    lines: list[str] = []
    plan = Plan(num_faults=1, kinds=("link_reset",), num_replicas=1, with_router=False, concurrency=8, num_cases=8)
    result = await run(plan, tell=lines.append)
    assert not result.ok and result.records[0].failures
    shutil.rmtree(lines[-1].removeprefix("the logs are in "))  # kept only for people to read


OF_REPLICAS = tuple(kind for kind in ALL_KINDS if kind not in ROUTER_KINDS)


@pytest.mark.parametrize(
    "kinds", [OF_REPLICAS[::2], OF_REPLICAS[1::2], sorted(ROUTER_KINDS)], ids=["1", "2", "routers"]
)
async def test_no_fault_is_noticed_by_any_client(kinds):
    result = await run_and_check(Plan(num_faults=len(kinds), kinds=kinds, seed=1, pause=0.3, router_flags=QUICK))
    assert {record.kind for record in result.records} == set(kinds)
    assert sum(record.moved for record in result.records) > 0


async def test_other_servers_go_on_by_the_text():
    kinds = ("kill_server", "link_reset", "error", "half_event")
    plan = Plan(
        engine="foreign",
        num_faults=len(kinds),
        kinds=kinds,
        pause=0.3,
        concurrency=24,
        num_cases=48,
        router_flags=QUICK,
    )
    await run_and_check(plan)


async def test_another_router_goes_on_by_the_text():
    flags = (*QUICK, "--replicate-sync")
    plan = Plan(
        engine="foreign",
        num_faults=2,
        kinds=("kill_router", "cut_clients"),
        pause=0.3,
        concurrency=24,
        num_cases=48,
        router_flags=flags,
    )
    await run_and_check(plan)


async def test_servers_of_both_kinds_answer_alike_behind_one_router():
    plan = Plan(engine="mixed", num_faults=2, kinds=("calm",), concurrency=32, num_cases=64, router_flags=QUICK)
    await run_and_check(plan)


async def test_a_query_of_death_takes_nobody_along(tmp_path):
    """It ends every engine that computes it: the third end is its own, and the requests beside it get their answers."""
    plan = Plan(engine="fake", concurrency=12, pace=200, max_tokens=24, router_flags=QUICK)
    cases = make_cases("fake", 24, seed=4, max_tokens=24)
    deadly = {"model": "fake", "prompt": f"this one {DEADLY}", "max_tokens": 5, "temperature": 0}
    async with scene(plan, tmp_path, {}) as (replicas, routers), aiohttp.ClientSession() as http:
        wanted = await undisturbed(http, replicas[0].url, cases, plan.concurrency)
        load = Load([routers[0].door], cases, wanted, random.Random(4))
        load.start(http, plan.concurrency)
        await asyncio.sleep(0.3)
        headers = {"x-request-id": "query-of-death"}
        async with http.post(f"{routers[0].url}/v1/completions", json=deadly, headers=headers) as response:
            status, body = response.status, await response.json()
        num_checked = load.num_checked
        while load.num_checked < num_checked + 2 * plan.concurrency:
            await asyncio.sleep(0.01)
        await load.stop()
    assert status == 500 and "query-of-death" in body["error"]["message"], (status, body)
    assert not load.failures, "\n".join(load.failures)
