"""Who is blamed when cores die, and how several replicas stand in for each other meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from shoal.config.parallel import ParallelConfig
from shoal.errors import EngineDeadError, EngineError
from tests.engine.mortal_cores import (
    LONG,
    PROMPT,
    Cores,
    begin,
    recovering,
    seen,
    undisturbed,
)
from tests.engine.test_async_engine import until, updates_of

# --- the query of death ----------------------------------------------------------------------------------------------

POISON = [444, 445, 446]


async def test_a_query_of_death_takes_nobody_along() -> None:
    cores = Cores(poison=POISON)
    async with recovering(cores) as engine:
        others = [begin(engine, engine.prepare(PROMPT, LONG, request_id=f"other{i}")) for i in range(3)]
        await until(lambda: cores.last.num_steps > 3)
        with pytest.raises(EngineError, match="request bad was in the engine at 3 crashes .* was poisoned") as caught:
            await engine.collect(engine.prepare(POISON, LONG, request_id="bad"))
        assert not isinstance(caught.value, EngineDeadError), "nobody else shall try it"
        results = [seen(await task) for task in others]
        await until(lambda: engine.num_restarts == 3)
    assert results == [await undisturbed(PROMPT, LONG)] * 3
    alone = set(cores.made[2].together)
    assert frozenset({"bad-0#2"}) in alone and all(len(running) <= 1 for running in alone)


async def test_suspects_run_one_after_the_other_and_nobody_beside_them() -> None:
    """Two kills from outside: all that ran is under suspicion, and nothing of it is lost."""
    cores = Cores()
    async with recovering(cores) as engine:
        tasks = [begin(engine, engine.prepare([300 + i], LONG.clone(n=1 + i % 2))) for i in range(6)]
        for number in range(2):
            await until(lambda number=number: len(cores.made) == number + 1 and cores.last.num_steps > 3)
            cores.last.die()
        await until(lambda: len(cores.made) == 3)
        late = begin(engine, engine.prepare(PROMPT, LONG, request_id="late"))
        results = [seen(await task) for task in tasks]
        assert seen(await late) == await undisturbed(PROMPT, LONG)
    for number, result in enumerate(results):
        assert result == await undisturbed([300 + number], LONG.clone(n=1 + number % 2))
    for running in cores.last.together:
        assert len({name.rsplit("-", 1)[0] for name in running}) <= 1, "one request at a time"
    order = list(dict.fromkeys(name.rsplit("-", 1)[0] for running in cores.last.together for name in running))
    assert order[-1] == "late" and len(order) == 7


async def test_who_asks_for_it_runs_alone_and_the_others_go_on_afterwards() -> None:
    cores = Cores()
    async with recovering(cores) as engine:
        others = [begin(engine, engine.prepare(PROMPT, LONG, request_id=f"other{i}")) for i in range(3)]
        await until(lambda: cores.last.num_steps > 10)
        alone = engine.prepare(PROMPT, LONG.clone(max_tokens=30), request_id="alone")
        alone.alone = True
        task = begin(engine, alone)
        # It may be over before somebody looks.
        await until(lambda: any("alone-0" in running for running in cores.last.together))
        late = begin(engine, engine.prepare(PROMPT, LONG, request_id="late"))
        assert len(seen(await task)[0]["ids"]) == 30
        assert [seen(await one) for one in [*others, late]] == [await undisturbed(PROMPT, LONG)] * 4
        assert engine.num_restarts == 0 and engine.num_requests_continued == 3
    assert all(running == {"alone-0"} for running in cores.last.together if "alone-0" in running)


async def test_one_that_was_at_two_crashes_elsewhere_fails_at_the_first_here() -> None:
    cores = Cores(poison=POISON)
    async with recovering(cores) as engine:
        other = begin(engine, engine.prepare(PROMPT, LONG, request_id="other"))
        await until(lambda: cores.last.num_steps > 3)
        bad = engine.prepare(POISON, LONG, request_id="bad")
        bad.num_crashes, bad.held = 2, False
        with pytest.raises(EngineError, match="request bad was in the engine at 3 crashes"):
            await engine.collect(bad)
        assert seen(await other) == await undisturbed(PROMPT, LONG)
        assert engine.num_restarts == 1


# --- several replicas ------------------------------------------------------------------------------------------------

TWO = {"parallel": ParallelConfig(data_size=2)}


async def test_requests_of_a_lost_replica_go_to_another_at_once_and_it_comes_back() -> None:
    cores = Cores()
    async with recovering(cores, config=TWO) as engine:
        tasks = [begin(engine, engine.prepare(PROMPT, LONG, request_id=str(i))) for i in range(4)]
        await until(lambda: all(core.num_steps > 3 for core in cores.made))
        cores.start_gate.clear()
        cores.made[0].die()
        results = [seen(await task) for task in tasks]
        assert results == [await undisturbed(PROMPT, LONG)] * 4
        assert not engine.restarting and [replica.failure is None for replica in engine.replicas] == [False, True]
        assert engine.num_requests_continued == 2
        cores.start_gate.set()
        await until(lambda: all(replica.failure is None for replica in engine.replicas))
        await asyncio.gather(*(updates_of(engine, engine.prepare(PROMPT, LONG)) for _ in range(2)))
        assert len(cores.made) == 3 and cores.made[2].num_steps > 0
        assert cores.made[2].config.parallel.data_rank == 0 and cores.made[2].config.generation == 1
        assert engine.num_restarts == 1


async def test_when_all_replicas_are_away_requests_wait() -> None:
    cores = Cores()
    async with recovering(cores, config=TWO) as engine:
        tasks = [begin(engine, engine.prepare(PROMPT, LONG)) for i in range(4)]
        await until(lambda: all(core.num_steps > 3 for core in cores.made))
        cores.start_gate.clear()
        for core in cores.made[:2]:
            core.die()
        await until(lambda: engine.restarting)
        assert "attempt 1 of" in engine.why_restarting
        tasks.append(begin(engine, engine.prepare(PROMPT, LONG)))
        cores.start_gate.set()
        assert [seen(await task) for task in tasks] == [await undisturbed(PROMPT, LONG)] * 5


async def test_a_suspect_gets_one_of_two_replicas_and_the_other_serves_on() -> None:
    cores = Cores()
    expected = await undisturbed(PROMPT, LONG)
    async with recovering(cores, config=TWO) as engine:
        others = [begin(engine, engine.prepare(PROMPT, LONG, request_id=f"other{i}")) for i in range(4)]
        await until(lambda: all(core.num_steps > 3 for core in cores.made))
        alone = engine.prepare(PROMPT, LONG, request_id="alone")
        alone.alone = True
        assert seen(await updates_of(engine, alone)) == expected
        assert [seen(await task) for task in others] == [expected] * 4
        assert engine.num_requests_continued == 2, "those of one replica moved"
        await asyncio.gather(*(updates_of(engine, engine.prepare(PROMPT, LONG)) for _ in range(2)))
    together = [running for core in cores.made for running in core.together if any("alone" in name for name in running)]
    assert together and all(len(running) == 1 for running in together)


async def test_answers_in_many_replicas_that_are_killed_at_once_are_not_blamed() -> None:
    cores = Cores()
    params = LONG.clone(n=4)
    async with recovering(cores, config={"parallel": ParallelConfig(data_size=4)}) as engine:
        task = begin(engine, engine.prepare(PROMPT, params))
        await until(lambda: all(core.num_steps > 3 for core in cores.made))
        for core in cores.made[:4]:
            core.die()
        assert seen(await task) == await undisturbed(PROMPT, params)


async def test_a_query_of_death_with_two_replicas() -> None:
    cores = Cores(poison=POISON)
    async with recovering(cores, config=TWO) as engine:
        others = [begin(engine, engine.prepare(PROMPT, LONG, request_id=f"other{i}")) for i in range(6)]
        await until(lambda: all(core.num_steps > 3 for core in cores.made))
        with pytest.raises(EngineError, match="request bad was in the engine at 3 crashes"):
            await engine.collect(engine.prepare(POISON, LONG, request_id="bad"))
        assert [seen(await task) for task in others] == [await undisturbed(PROMPT, LONG)] * 6
