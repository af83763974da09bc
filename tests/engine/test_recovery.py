"""A lost core comes back and its requests carry on: what the consumers see, how often, for how long, and who is to
blame."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config.parallel import ParallelConfig
from shoal.engine.async_engine import AsyncEngine
from shoal.engine.restart_budget import RestartLimits
from shoal.errors import EngineDeadError, StartupError
from shoal.messages import EngineStats
from shoal.types import FinishReason, SamplingParams
from tests.engine.mortal_cores import (
    LONG,
    PROMPT,
    Cores,
    MortalCore,
    begin,
    random_prompt,
    recovering,
    seen,
    undisturbed,
)
from tests.engine.test_async_engine import until, updates_of

# --- the promise -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 4))
def test_whenever_cores_die_every_stream_is_what_it_would_have_been(
    seed: int, num_replicas: int, tokens_per_step: int
) -> None:
    """Random requests of all kinds, random deaths, random departures."""
    asyncio.run(_random_deaths(random.Random(seed), num_replicas, tokens_per_step))


async def _random_deaths(chance: random.Random, num_replicas: int, tokens_per_step: int) -> None:
    requests = []
    for _ in range(chance.randint(1, 12)):
        params = SamplingParams(
            max_tokens=chance.randint(1, 60), n=chance.choice([1, 1, 2, 3]), seed=chance.randint(0, 99),
            logprobs=chance.choice([None, 0, 2]), prompt_logprobs=chance.choice([None, None, 1]),
            stop=chance.choice([None, "e", "th"]), ignore_eos=chance.random() < 0.3,
        )  # fmt: skip
        requests.append((random_prompt(chance), params, chance.choice([None, None, None, 2])))
    lives = [chance.randint(1, 25) for _ in range(chance.randint(0, 6))]

    def prepare(core: MortalCore) -> None:
        core.tokens_per_step = tokens_per_step
        core.dies_at = lives.pop() if lives else None

    async def one(engine: AsyncEngine, number: int) -> dict[int, dict[str, Any]] | None:
        prompt, params, leave_after = requests[number]
        updates = []
        async with contextlib.aclosing(engine.stream(engine.prepare(prompt, params))) as stream:
            async for update in stream:
                updates.append(update)
                if len(updates) == leave_after:
                    return None
        return seen(updates)

    cores = Cores()
    cores.prepare = prepare
    async with recovering(cores, config={"parallel": ParallelConfig(data_size=num_replicas)}) as engine:
        async with asyncio.timeout(60):
            got = await asyncio.gather(*(one(engine, number) for number in range(len(requests))))
        by_name = [result for result in got if result and any(_failed_by_name(end) for end in _ends(result))]
        # Two deaths make suspects; each one after that can be blamed on one of them, which is told so by name.
        assert len(by_name) <= max(0, sum(core.died for core in cores.made) - 2)
    plain = Cores()
    plain.prepare = lambda core: setattr(core, "tokens_per_step", tokens_per_step)
    async with recovering(plain) as engine:
        for (prompt, params, _), result in zip(requests, got, strict=True):
            if result is None or result in by_name:
                continue
            assert result == seen(await updates_of(engine, engine.prepare(prompt, params)))


def _ends(result: dict[int, dict[str, Any]]) -> list[Any]:
    return [answer["end"] for answer in result.values()]


def _failed_by_name(end: Any) -> bool:
    return end[0] is FinishReason.ERROR and "crashes and does not run again" in end[2]


async def test_a_consumer_notices_a_pause_only() -> None:
    params = SamplingParams(max_tokens=100, seed=5, n=2, logprobs=1, prompt_logprobs=0, ignore_eos=True)
    cores = Cores()
    async with recovering(cores) as engine:
        task = begin(engine, engine.prepare(PROMPT, params, request_id="r"))
        for length in (10, 30):
            await until(lambda length=length: cores.last.num_steps > length)
            cores.last.die()
            await until(lambda: cores.last._failure is None)
            if length == 10:
                assert engine.alive and engine.admitting
        result = seen(await task)
        assert engine.num_restarts == 2 and engine.num_requests_continued == 4
        assert engine.num_tokens_replayed >= 2 * (10 + 30)
        assert not engine.restarting and engine.why_restarting == ""
    assert result == await undisturbed(PROMPT, params)
    assert [core.config.generation for core in cores.made] == [0, 1, 2]
    assert sorted(cores.added()) == sorted(f"r-{index}{suffix}" for index in (0, 1) for suffix in ("", "#1", "#2"))
    first, second, _ = cores.made
    continued = [message.request for message in second.sent]  # type: ignore[union-attr]
    assert all(request.sampling.prompt_logprobs is None for request in continued), "they were told already"
    assert all(len(request.emitted_token_ids) >= 10 for request in continued)
    assert first.closed


async def test_a_stop_string_over_the_cut_is_found() -> None:
    whole = (await undisturbed(PROMPT, LONG))[0]
    text = whole["text"]
    stop = text[20:32]
    params = LONG.clone(stop=[stop])
    expected = await undisturbed(PROMPT, params)
    assert expected[0]["end"][:2] == (FinishReason.STOP, stop)
    num_tokens = len(expected[0]["ids"])
    for cut in range(1, num_tokens):
        cores = Cores()
        async with recovering(cores) as engine:
            cores.last.dies_at = cut
            assert seen(await updates_of(engine, engine.prepare(PROMPT, params))) == expected
            assert engine.num_restarts == 1


async def test_an_answer_whose_last_token_came_ends_without_a_core() -> None:
    cores = Cores()
    async with recovering(cores) as engine:
        original = cores.last._step

        def without_the_end(running: Any) -> Any:
            delta = original(running)
            delta.finish_reason = None
            return delta

        cores.last._step = without_the_end  # type: ignore[method-assign]
        task = begin(engine, engine.prepare(PROMPT, LONG.clone(max_tokens=1), request_id="r"))
        await until(lambda: cores.last.num_steps == 1)
        assert engine.num_unfinished == 1
        cores.last.die()
        result = seen(await task)
        assert result[0]["end"][0] is FinishReason.LENGTH and len(result[0]["ids"]) == 1
        await until(lambda: len(cores.made) == 2)
    assert cores.added() == ["r-0"]


async def test_outputs_of_a_lost_core_are_not_believed() -> None:
    cores = Cores()
    async with recovering(cores) as engine:
        task = begin(engine, engine.prepare(PROMPT, LONG))
        await until(lambda: cores.last.num_steps > 5)
        cores.last.die()
        await until(lambda: len(cores.made) == 2)
        cores.last.config = cores.made[0].config  # speaks as one of the older generation
        await until(lambda: cores.last.num_steps > 5)
        assert engine.num_unfinished == 1
        unheard = cores.last.num_steps
        cores.last.die()
        result = seen(await task)
        assert unheard > 5
    assert result == await undisturbed(PROMPT, LONG)


async def test_a_core_that_hangs_for_longer_than_a_step_may_take_is_replaced() -> None:
    cores = Cores()
    async with recovering(cores, config={"parallel": ParallelConfig(step_timeout=0.2)}) as engine:
        task = begin(engine, engine.prepare(PROMPT, LONG))
        await until(lambda: cores.last.num_steps > 5)
        cores.last.gate.clear()
        assert seen(await task) == await undisturbed(PROMPT, LONG)
        assert engine.num_restarts == 1 and cores.made[0].died


async def test_what_was_on_its_way_when_the_core_died_is_sent_again_and_not_suspected() -> None:
    cores = Cores()
    async with recovering(cores) as engine:
        gone = asyncio.Event()

        async def send(message: Any) -> None:
            await gone.wait()
            raise EngineDeadError("the engine core was killed by signal 9")

        cores.last.send = send  # type: ignore[method-assign]
        task = begin(engine, engine.prepare(PROMPT, LONG, request_id="r"))
        await until(lambda: engine.num_unfinished == 1)
        cores.last.die()
        await until(lambda: engine.num_restarts == 1)
        gone.set()
        await until(lambda: cores.last.running)
        assert engine._streams["r"].num_crashes == 0
        assert seen(await task) == await undisturbed(PROMPT, LONG)
    assert cores.added() == ["r-0#1"]


# --- waiting ---------------------------------------------------------------------------------------------------------


async def test_new_requests_wait_for_the_restart_and_go_in_order_of_arrival() -> None:
    cores = Cores()
    async with recovering(cores) as engine:
        tasks = [begin(engine, engine.prepare(PROMPT, LONG, request_id=f"old{i}")) for i in range(2)]
        await until(lambda: cores.last.num_steps > 3)
        cores.start_gate.clear()
        cores.last.die()
        await until(lambda: engine.restarting)
        assert engine.alive and engine.admitting and not engine.progressing
        assert engine.why_restarting == (
            "the engine is restarting (attempt 1 of 100000): the engine core was killed by signal 9"
        )
        assert engine.replicas[0].failure == engine.why_restarting
        assert engine.latest_stats.num_requests_running == 0
        tasks += [begin(engine, engine.prepare(PROMPT, LONG, request_id=f"new{i}")) for i in range(3)]
        await until(lambda: engine.num_unfinished == 5)
        with pytest.raises(EngineDeadError, match="restarting"):
            await engine.stats()
        cores.start_gate.set()
        results = [seen(await task) for task in tasks]
        stats = await engine.stats()
        assert isinstance(stats, EngineStats) and stats.num_steps_total == sum(core.num_steps for core in cores.made)
    assert results == [await undisturbed(PROMPT, LONG)] * 5
    assert cores.added() == ["old0-0", "old1-0", "old0-0#1", "old1-0#1", "new0-0", "new1-0", "new2-0"]


async def test_a_request_without_progress_for_its_deadline_hears_why() -> None:
    cores = Cores()
    async with recovering(cores, config={"parallel": ParallelConfig(step_timeout=0.04)}) as engine:
        patient, hasty = (engine.prepare(PROMPT, LONG, request_id=name) for name in ("patient", "hasty"))
        hasty.deadline_seconds = 0.05
        waiting = begin(engine, patient)
        task = asyncio.create_task(engine.collect(hasty))
        await until(lambda: cores.last.num_steps > 3)
        cores.start_gate.clear()
        cores.last.die()
        said = (
            r"no progress for 0.05 s, the deadline of this request: the engine is restarting \(attempt 1 of .*signal 9"
        )
        with pytest.raises(EngineDeadError, match=said):
            await task
        assert engine.num_unfinished == 1
        cores.start_gate.set()
        assert seen(await waiting)[0]["end"][0] is FinishReason.LENGTH


async def test_leaving_and_aborting_while_the_engine_is_away() -> None:
    cores = Cores()
    async with recovering(cores) as engine:
        tasks = {name: begin(engine, engine.prepare(PROMPT, LONG, request_id=name)) for name in ("stays", "goes", "is")}
        await until(lambda: cores.last.num_steps > 3)
        cores.start_gate.clear()
        cores.last.die()
        await until(lambda: engine.restarting)
        tasks["goes"].cancel()
        await engine.abort("is")
        aborted = seen(await tasks["is"])[0]
        assert aborted["end"] == (FinishReason.ABORT, None, None) and len(aborted["ids"]) >= 3
        await asyncio.gather(tasks["goes"], return_exceptions=True)
        cores.start_gate.set()
        assert seen(await tasks["stays"])[0]["end"][0] is FinishReason.LENGTH
    assert [name for name in cores.added() if "#" in name] == ["stays-0#1"]


async def test_an_abort_that_a_dying_core_did_not_answer_ends_the_request() -> None:
    cores = Cores()
    async with recovering(cores) as engine:
        task = begin(engine, engine.prepare(PROMPT, LONG, request_id="r"))
        await until(lambda: cores.last.num_steps > 3)
        cores.last.gate.clear()
        await engine.abort("r")
        cores.last.die()
        assert seen(await task)[0]["end"] == (FinishReason.ABORT, None, None)
    assert cores.added() == ["r-0"]


async def test_a_request_of_a_router_is_not_held() -> None:
    cores = Cores()
    async with recovering(cores) as engine:
        prepared = engine.prepare(PROMPT, LONG, request_id="routed")
        prepared.held = False
        task = begin(engine, prepared)
        mine = begin(engine, engine.prepare(PROMPT, LONG))
        await until(lambda: cores.last.num_steps > 3)
        cores.start_gate.clear()
        cores.last.die()
        updates = await task
        assert updates[-1].lost and updates[-1].finish_reason is FinishReason.ERROR
        assert updates[-1].error is not None and "signal 9" in updates[-1].error
        late = engine.prepare(PROMPT, LONG)
        late.held = False
        with pytest.raises(EngineDeadError, match="the engine is restarting"):
            await updates_of(engine, late)
        cores.start_gate.set()
        assert seen(await mine)[0]["end"][0] is FinishReason.LENGTH


@pytest.mark.parametrize("closes", [False, True])
async def test_draining_waits_for_what_waits_and_closing_ends_it(closes: bool) -> None:
    cores = Cores()
    async with recovering(cores) as engine:
        task = begin(engine, engine.prepare(PROMPT, LONG))
        await until(lambda: cores.last.num_steps > 3)
        cores.start_gate.clear()
        cores.last.die()
        await until(lambda: engine.restarting)
        engine.begin_drain()
        assert not await engine.wait_drained(0.01)
        if closes:
            await engine.close()
            assert seen(await task)[0]["end"][0] is FinishReason.ABORT
            assert not engine.alive and not engine.restarting
        else:
            cores.start_gate.set()
            assert await engine.wait_drained(5)
            assert seen(await task)[0]["end"][0] is FinishReason.LENGTH


# --- how often -------------------------------------------------------------------------------------------------------


async def test_when_restarts_are_exhausted_all_end_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = _no_sleep(monkeypatch)
    cores = Cores()
    cores.refuse = lambda core: StartupError("no memory") if len(cores.made) > 1 else None
    async with recovering(cores, RestartLimits(4, 600.0)) as engine:
        tasks = [begin(engine, engine.prepare(PROMPT, LONG)) for _ in range(3)]
        await until(lambda: cores.last.num_steps > 3)
        cores.last.die()
        for updates in await asyncio.gather(*tasks):
            assert updates[-1].finish_reason is FinishReason.ERROR and updates[-1].lost
            assert updates[-1].error == (
                "no memory; it is not started again after 4 restarts within 600 s "
                "(--max-engine-restarts, --engine-restart-window)"
            )
        assert not engine.alive and not engine.restarting
        with pytest.raises(EngineDeadError, match="no memory"):
            await engine.stats()
    assert slept == [0.0, 1.0, 2.0, 4.0] and len(cores.made) == 5
    assert [core.config.generation for core in cores.made] == [0, 1, 2, 3, 4]


async def test_a_start_that_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _no_sleep(monkeypatch)
    cores = Cores()
    errors: dict[int, Exception] = {2: StartupError("no memory"), 3: OSError("no more processes")}
    cores.refuse = lambda core: errors.get(len(cores.made))
    async with recovering(cores, RestartLimits(5, 600.0)) as engine:
        task = begin(engine, engine.prepare(PROMPT, LONG))
        await until(lambda: cores.last.num_steps > 3)
        cores.last.die()
        assert seen(await task) == await undisturbed(PROMPT, LONG)
        assert engine.num_restarts == 1 and len(cores.made) == 4


async def test_the_first_start_is_the_callers() -> None:
    cores = Cores()
    cores.refuse = lambda core: StartupError("no memory")
    with pytest.raises(StartupError, match="no memory"):
        async with recovering(cores):
            pass
    assert len(cores.made) == 1


def _no_sleep(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The back-off as it was asked for, without the waiting."""
    slept: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    class Module:
        def __getattr__(self, name: str) -> Any:
            return note if name == "sleep" else getattr(asyncio, name)

    monkeypatch.setattr("shoal.engine.recovery.asyncio", Module())
    return slept
