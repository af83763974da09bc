"""Several cores as one: who gets which request, and what the death of one means to the others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from shoal.config.parallel import ParallelConfig
from shoal.engine.async_engine import AsyncEngine
from shoal.engine.client import ProgressCallback, SubprocessClient
from shoal.engine.prepare import PreparedRequest
from shoal.engine.replicas import ReplicatedClient, make_client
from shoal.errors import EngineDeadError, EngineError, ModelError, StartupError, UnavailableError
from shoal.messages import AbortRequests, AddRequest, ClientMessage, CoreReady, StartupProgress, TokenDelta
from shoal.types import FinishReason, RequestUpdate, SamplingParams
from tests.engine.fake_client import FakeClient, make_config, say
from tests.engine.test_async_engine import END, FOX, until, updates_of
from tests.engine.tokenizers_for_tests import tokenizer

LONG = SamplingParams(max_tokens=200)


@contextlib.asynccontextmanager
async def running(
    num_replicas: int = 2, *, cores: list[FakeClient] | None = None, avoid_after: float = 100.0, **options: Any
) -> AsyncIterator[tuple[AsyncEngine, list[FakeClient], ReplicatedClient]]:
    """At the end nothing of any request is left in the client's books."""
    config = make_config(**options.pop("config", {}))
    cores = cores or [FakeClient(config) for _ in range(num_replicas)]
    client = ReplicatedClient(cores, avoid_after=avoid_after)
    await client.start()
    engine = AsyncEngine(client, config, tokenizer(), **options)
    await engine.start()
    try:
        yield engine, cores, client
        await until(lambda: not engine._sends)
        if engine.num_unfinished == 0:
            assert not client._owners
            assert not any(len(replica.workload) or replica.sending for replica in client._replicas)
    finally:
        await engine.close()
        assert all(core.closed for core in cores)
        assert engine.num_unfinished == 0


def added(core: FakeClient) -> list[str]:
    return [message.request.request_id for message in core.sent if isinstance(message, AddRequest)]


def endings(updates: list[RequestUpdate]) -> list[FinishReason]:
    return [update.finish_reason for update in updates if update.finish_reason]


class Slow(FakeClient):
    """Its sends wait; the core dies meanwhile and nothing arrives."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.waiting = 0
        self._dead = asyncio.Event()

    async def send(self, message: ClientMessage) -> None:
        self._check()
        self.waiting += 1
        await self._dead.wait()
        await asyncio.sleep(0)  # whoever receives hears of it first
        await asyncio.sleep(0)
        self._check()

    def die(self, how: str = "the engine core was killed by signal 9") -> None:
        super().die(how)
        self._dead.set()


# --- balance ---------------------------------------------------------------------------------------------------------


async def test_a_burst_is_spread_evenly_and_so_are_the_answers_of_one_request() -> None:
    async with running(3) as (engine, cores, _):
        for core in cores:
            core.gate.clear()
        tasks = [asyncio.create_task(engine.collect(engine.prepare("x", LONG))) for _ in range(9)]
        await until(lambda: sum(map(len, map(added, cores))) == 9)
        assert [len(added(core)) for core in cores] == [3, 3, 3]
        tasks.append(asyncio.create_task(engine.collect(engine.prepare("x", LONG.clone(n=6), request_id="several"))))
        await until(lambda: sum(map(len, map(added, cores))) == 15)
        assert [len(added(core)) for core in cores] == [5, 5, 5]
        assert all(sum(id.startswith("several") for id in added(core)) == 2 for core in cores)
        for core in cores:
            core.gate.set()
        outputs = await asyncio.gather(*tasks)
        assert [len(output.outputs) for output in outputs] == [1] * 9 + [6]


async def test_idle_replicas_take_turns() -> None:
    async with running(3) as (engine, cores, _):
        for index in range(7):
            await engine.collect(engine.prepare("x", SamplingParams(max_tokens=2), request_id=str(index)))
        assert [added(core) for core in cores] == [["0-0", "3-0", "6-0"], ["1-0", "4-0"], ["2-0", "5-0"]]


async def test_a_request_goes_where_less_is_to_do() -> None:
    async with running() as (engine, cores, _):
        for core in cores:
            core.gate.clear()

        async def add(request_id: str, num_prompt: int = 1) -> asyncio.Task[Any]:
            prepared = engine.prepare([5] * num_prompt, LONG.clone(max_tokens=20), request_id=request_id)
            task = asyncio.create_task(engine.collect(prepared))
            await until(lambda: any(f"{request_id}-0" in added(core) for core in cores))
            return task

        tasks = [await add("long", 200), await add("short", 20), await add("next")]
        assert added(cores[0]) == ["long-0"] and added(cores[1]) == ["short-0", "next-0"]
        cores[1].gate.set()  # both of its requests run now, and one that waits weighs more than that
        await until(lambda: cores[1].num_steps > 2)
        cores[1].gate.clear()
        tasks.append(await add("later"))
        assert added(cores[1])[-1] == "later-0"
        for core in cores:
            core.gate.set()
        await asyncio.gather(*tasks)


async def test_a_replica_that_hangs_shows_and_gets_nothing_new_while_another_gets_on() -> None:
    async with running(progress_timeout=0.6, avoid_after=0.5) as (engine, cores, _):
        await asyncio.sleep(0.7)
        hanging = asyncio.create_task(engine.collect(engine.prepare("x", LONG)))
        await until(lambda: cores[0].running)
        assert engine.progressing, "what had nothing to do for long does not hang"
        await until(lambda: cores[0].num_steps > 3)
        cores[0].gate.clear()
        await until(lambda: engine.stalled)
        assert engine.stalled == [0] and not engine.progressing
        assert engine.alive and engine.admitting
        # All of them cost more than the one that hangs.
        await asyncio.gather(*(engine.collect(engine.prepare("x", LONG)) for _ in range(5)))
        assert len(added(cores[0])) == 1
        cores[0].gate.set()
        await hanging
        assert engine.progressing


async def test_a_replica_that_hangs_for_longer_than_a_step_may_take_is_lost() -> None:
    async with running(config={"parallel": ParallelConfig(data_size=2, step_timeout=0.6)}) as (engine, cores, _):
        await asyncio.sleep(1.0)
        assert engine.progressing, "there was nothing to do"
        cores[1].gate.clear()
        tasks = [asyncio.create_task(updates_of(engine, engine.prepare("x", LONG))) for _ in range(2)]
        fine, lost = [await task for task in tasks]
        assert endings(fine) == [FinishReason.LENGTH] and endings(lost) == [FinishReason.ERROR]
        assert lost[-1].error is not None
        assert "replica 1 is gone: the engine core made no step for 0.6 s although it has work" in lost[-1].error
        assert engine.alive and [replica.failure is None for replica in engine.replicas] == [True, False]


async def test_a_full_queue_counts_the_places_of_all_replicas_that_are_there() -> None:
    async with running(max_num_waiting=1, config={"max_num_seqs": 2}) as (engine, cores, _):
        for core in cores:
            core.gate.clear()
        tasks = [asyncio.create_task(updates_of(engine, engine.prepare("x", LONG))) for _ in range(4)]
        await until(lambda: engine.num_unfinished == 4)
        engine.prepare("x", LONG)
        tasks.append(asyncio.create_task(updates_of(engine, engine.prepare("x", LONG))))
        await until(lambda: engine.num_unfinished == 5)
        with pytest.raises(UnavailableError, match="1 requests wait already"):
            engine.prepare("x", LONG)
        for core in cores:
            core.gate.set()
        await asyncio.gather(*tasks)


# --- what goes to whom -----------------------------------------------------------------------------------------------


async def test_aborts_and_stop_strings_reach_the_core_that_has_the_request() -> None:
    config = make_config()
    cores = [FakeClient(config, say(FOX, END)) for _ in range(2)]
    async with running(cores=cores) as (engine, cores, _):
        await engine.collect(engine.prepare("x", LONG.clone(stop=" fox"), request_id="first"))
        stream = engine.stream(engine.prepare("x", LONG.clone(n=2), request_id="both"))
        await anext(stream)
        await stream.aclose()
        await engine.abort("unknown")
        await until(lambda: not cores[0].running and not cores[1].running)
        aborted = [[m.request_ids for m in core.sent if isinstance(m, AbortRequests)] for core in cores]
        assert sorted(id for core in aborted for ids in core for id in ids) == ["both-0", "both-1", "first-0"]
        for core, ids in zip(cores, aborted, strict=True):
            assert {id for one in ids for id in one} <= set(added(core))


async def test_abort_ends_a_stream_with_its_tokens() -> None:
    async with running() as (engine, cores, _):
        task = asyncio.create_task(updates_of(engine, engine.prepare("x", LONG.clone(n=2), request_id="r")))
        await until(lambda: cores[0].num_steps > 3 and cores[1].num_steps > 3)
        await engine.abort("r")
        updates = await task
        assert endings(updates) == [FinishReason.ABORT] * 2
        assert {update.index for update in updates if update.token_ids} == {0, 1}


async def test_what_a_core_sends_late_does_not_reach_a_request_of_the_same_name_on_another() -> None:
    async with running() as (engine, cores, _):
        stream = engine.stream(engine.prepare("x", LONG, request_id="r"))
        await anext(stream)
        await stream.aclose()
        await until(lambda: not cores[0].running)
        cores[1].gate.clear()
        task = asyncio.create_task(updates_of(engine, engine.prepare("x", LONG.clone(max_tokens=30), request_id="r")))
        await until(lambda: cores[1].running)
        num_steps = cores[0].num_steps
        cores[0]._early.append(TokenDelta("r-0", [77], finish_reason=FinishReason.STOP))
        cores[0]._work.set()
        await until(lambda: cores[0].num_steps > num_steps)
        cores[1].gate.set()
        updates = await task
        assert [id for update in updates for id in update.token_ids] == list(range(300, 330))
        assert endings(updates) == [FinishReason.LENGTH]


async def test_questions_go_to_all() -> None:
    async with running(3) as (engine, cores, client):
        for core in cores[:2]:
            core.num_steps = 10
        stats = await engine.stats()
        assert stats.num_steps_total == 20
        assert await client.utility("ping") is not None
        await engine.reset_prefix_cache()
        cores[0].die()
        assert (await engine.stats()).num_steps_total == 10
        cores[1].die()
        cores[2].die()
        with pytest.raises(EngineDeadError, match="all 3 replicas are gone: replica 0: .*signal 9; replica 1"):
            await engine.stats()


# --- death -----------------------------------------------------------------------------------------------------------


async def test_the_death_of_one_ends_its_requests_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("shoal").propagate = True
    async with running() as (engine, cores, _):
        tasks = [asyncio.create_task(updates_of(engine, engine.prepare("x", LONG, request_id=str(i)))) for i in (0, 1)]
        both = asyncio.create_task(updates_of(engine, engine.prepare("x", LONG.clone(n=2), request_id="both")))
        await until(lambda: cores[0].num_steps > 3 and cores[1].num_steps > 3)
        mine = [id for core in cores for id in ("0-0", "1-0") if core is cores[0] and id in added(core)]
        assert mine == ["0-0"]
        cores[0].die()
        lost, kept = await tasks[0], await tasks[1]
        assert endings(lost) == [FinishReason.ERROR]
        assert lost[-1].error == "replica 0 is gone: the engine core was killed by signal 9"
        assert lost[-1].lost, "and could be had elsewhere"
        assert sum(len(update.token_ids) for update in lost) >= 3, "what came before is kept"
        assert endings(kept) == [FinishReason.LENGTH]
        assert [id for update in kept for id in update.token_ids] == [300 + i % 50 for i in range(200)]
        assert sorted(endings(await both)) == [FinishReason.ERROR, FinishReason.LENGTH]
        # It goes on, on the one that is left.
        assert engine.alive and engine.admitting and engine.progressing
        assert [replica.failure for replica in engine.replicas] == ["the engine core was killed by signal 9", None]
        await until(lambda: cores[0].closed)
        for _ in range(3):
            assert (await engine.collect(engine.prepare("x", SamplingParams(max_tokens=5)))).finished
        assert len(added(cores[0])) == 2
    (line,) = [record.getMessage() for record in caplog.records if "is gone" in record.getMessage()]
    assert "replica 0 is gone (the engine core was killed by signal 9): 2 of its requests" in line
    assert "1 of 2 replicas go on" in line


async def test_when_all_are_gone_the_engine_is() -> None:
    async with running() as (engine, cores, _):
        tasks = [asyncio.create_task(updates_of(engine, engine.prepare("x", LONG.clone(n=2)))) for _ in range(3)]
        collecting = asyncio.create_task(engine.collect(engine.prepare("x", LONG)))
        await until(lambda: cores[0].num_steps > 3 and cores[1].num_steps > 3)
        cores[1].die("the engine core ended with exit code 1")
        cores[0].die()
        for updates in await asyncio.gather(*tasks):
            assert endings(updates) == [FinishReason.ERROR] * 2
        with pytest.raises(EngineError, match="is gone"):
            await collecting
        await until(lambda: not engine.alive)
        assert not engine.admitting and not engine.progressing
        with pytest.raises(EngineDeadError, match="replica 0: .* signal 9; replica 1: .* exit code 1"):
            engine.prepare("x", LONG)


async def test_a_request_that_never_arrived_goes_to_another_replica() -> None:
    config = make_config()
    slow = Slow(config)
    async with running(cores=[slow, FakeClient(config)]) as (engine, (_, other), _):
        task = asyncio.create_task(updates_of(engine, engine.prepare("x", LONG, request_id="r")))
        await until(lambda: slow.waiting)
        slow.die()
        updates = await task
        assert endings(updates) == [FinishReason.LENGTH]
        assert sum(len(update.token_ids) for update in updates) == 200
        assert added(other) == ["r-0"]


@pytest.mark.parametrize("how", ["abort", "cancel"])
async def test_a_request_that_is_ended_on_its_way_goes_nowhere(how: str) -> None:
    config = make_config()
    slow = Slow(config)
    async with running(cores=[slow, FakeClient(config)]) as (engine, (_, other), _):
        task = asyncio.create_task(updates_of(engine, engine.prepare("x", LONG, request_id="r")))
        await until(lambda: slow.waiting)
        ending = None
        if how == "abort":
            ending = asyncio.create_task(engine.abort("r"))
            await until(lambda: slow.waiting == 2)
        else:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        slow.die()
        if ending is not None:
            await ending
            assert endings(await task) == [FinishReason.ABORT]
        assert (await engine.collect(engine.prepare("x", SamplingParams(max_tokens=2), request_id="s"))).finished
        assert added(other) == ["s-0"]


async def test_streams_with_random_departures_and_deaths_all_end_once() -> None:
    chance = random.Random(0)
    ends: list[FinishReason] = []

    async def one(engine: AsyncEngine, prepared: PreparedRequest, leave_after: int | None) -> None:
        seen, ended = 0, []
        async with contextlib.aclosing(engine.stream(prepared)) as stream:
            async for update in stream:
                seen += 1
                ended += [update] if update.finish_reason else []
                if seen == leave_after:
                    return
        assert sorted(update.index for update in ended) == list(range(prepared.params.n))
        ends.extend(update.finish_reason for update in ended)

    async with running(4) as (engine, cores, _):
        tasks = []
        for index in range(200):
            params = SamplingParams(max_tokens=chance.randint(1, 60), n=chance.choice([1, 1, 2, 5]))
            leave_after = chance.choice([None, None, None, 1, 7])
            tasks.append(
                asyncio.create_task(one(engine, engine.prepare([5] * chance.randint(1, 99), params), leave_after))
            )
            await asyncio.sleep(0)
            if index in (60, 120, 180):
                cores[index // 60].die()
        await asyncio.gather(*tasks)
        assert engine.num_unfinished == 0
        await until(lambda: not cores[0].running)
    assert ends.count(FinishReason.LENGTH) > 100 and ends.count(FinishReason.ERROR) > 10


# --- start and end ---------------------------------------------------------------------------------------------------


class Starting(FakeClient):
    """A core whose start is what the test says."""

    def __init__(self, steps: list[StartupProgress] | Exception, begun: list[FakeClient], wanted: int) -> None:
        super().__init__(make_config())
        self._steps = steps
        self._begun = begun
        self._wanted = wanted

    async def start(self, on_progress: ProgressCallback | None = None) -> CoreReady:
        self._begun.append(self)
        await until(lambda: len(self._begun) == self._wanted)  # all at once, or never
        if isinstance(self._steps, Exception):
            raise self._steps
        for news in self._steps:
            assert on_progress is not None
            on_progress(news)
            await asyncio.sleep(0)
        if not self._steps:
            await asyncio.Event().wait()
        return self.ready


async def test_all_start_at_once_and_tell_their_progress_as_one() -> None:
    begun: list[FakeClient] = []
    steps = [StartupProgress("load", 1, 10), StartupProgress("load", 9, 10), StartupProgress("warm up")]
    client = ReplicatedClient([Starting(steps, begun, 3) for _ in range(3)])
    seen: list[StartupProgress] = []
    ready = await client.start(seen.append)
    assert seen[-1].phase == "warm up"
    loading = [(news.done, news.total) for news in seen if news.phase == "load"]
    assert loading == sorted(loading) and {total for _, total in loading} == {30}
    assert ready.num_blocks == 3 * 99 + 1 and len(ready.info["replicas"]) == 3
    await client.close()


async def test_one_that_cannot_start_ends_the_others_and_is_named() -> None:
    for error in (StartupError("no memory"), ModelError("no model")):
        begun: list[FakeClient] = []
        cores = [Starting([], begun, 2), Starting(error, begun, 2)]
        with pytest.raises(type(error), match="replica 1 of 2: no m"):
            await ReplicatedClient(cores).start()
        assert all(core.closed for core in cores)


def test_make_client_gives_each_core_its_data_rank() -> None:
    made: list[int] = []

    def one(config: Any) -> FakeClient:
        made.append(config.parallel.data_rank)
        return FakeClient(config)

    assert isinstance(make_client(make_config(), one), FakeClient)
    client = make_client(make_config(parallel=ParallelConfig(data_size=3)), one)
    assert isinstance(client, ReplicatedClient) and made == [0, 0, 1, 2]
    assert isinstance(make_client(make_config()), SubprocessClient)


async def test_draining_finishes_what_runs_on_all_and_killing_ends_all() -> None:
    async with running() as (engine, cores, client):
        for core in cores:
            core.gate.clear()
        tasks = [asyncio.create_task(engine.collect(engine.prepare("x", LONG))) for _ in range(4)]
        await until(lambda: len(cores[0].running) == len(cores[1].running) == 2)
        engine.begin_drain()
        assert not await engine.wait_drained(0.01)
        for core in cores:
            core.gate.set()
        assert await engine.wait_drained(5)
        assert all(output.outputs[0].finish_reason == "length" for output in await asyncio.gather(*tasks))
        client.kill("was not wanted", 1)
        await until(lambda: cores[1].closed)
        assert engine.replicas[1].failure == "the engine core was not wanted" and engine.alive
        client.kill("was not wanted")
        await until(lambda: not engine.alive)
