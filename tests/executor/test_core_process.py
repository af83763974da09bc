"""An engine core as its client sees it, with several workers: what kills one of them is told, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import msgspec
import pytest

from shoal.engine.client import SubprocessClient
from shoal.errors import EngineDeadError, StartupError
from shoal.messages import AddRequest, EngineStats
from shoal.types import EngineRequest, SamplingParams
from tests.executor.engines import is_running, make_config, pids


def make_client(directory: Path, behaviour: str = "", **parallel: object) -> SubprocessClient:
    client = SubprocessClient(make_config(3, **parallel))
    client.program = (sys.executable, "-m", "tests.executor.core_program", behaviour, str(directory))
    return client


async def all_gone(directory: Path, client: SubprocessClient) -> None:
    """Within five seconds."""
    started = [*pids(directory), client.process_id]
    assert len(started) == 4
    for _ in range(500):
        if not any(is_running(pid) for pid in started if pid is not None):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("some still run")


def request(max_tokens: int = 1400) -> AddRequest:
    """By default it runs for longer than a test looks at it."""
    return AddRequest(EngineRequest("a", [1, 2, 3], SamplingParams(max_tokens=max_tokens, ignore_eos=True)))


async def next_death(client: SubprocessClient) -> str:
    with pytest.raises(EngineDeadError) as caught:
        while True:
            await client.receive()
    return str(caught.value)


async def test_requests_are_served_and_the_end_is_clean(tmp_path):
    client = make_client(tmp_path)
    ready = await client.start()
    assert ready.info["ranks"] == 3 and ready.num_blocks == 98
    await client.send(request(max_tokens=50))
    token_ids: list[int] = []
    while len(token_ids) < 50:
        for delta in (await client.receive()).deltas:
            token_ids += delta.token_ids
    stats = msgspec.convert(await client.utility("stats"), EngineStats)
    assert [rank.rank for rank in stats.ranks] == [0, 1, 2]
    assert all(rank.num_steps_total >= 45 and rank.num_collectives_total >= 45 for rank in stats.ranks)
    assert all(rank.collective_seconds_total > 0 and rank.seconds_since_progress < 60 for rank in stats.ranks)
    await client.close()
    await all_gone(tmp_path, client)
    assert len(list(tmp_path.glob("ended-*"))) == 3


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
async def test_a_killed_worker_is_named(tmp_path, busy):
    client = make_client(tmp_path)
    await client.start()
    if busy:
        await client.send(request())
        await client.receive()
    victim = pids(tmp_path)[2]
    os.kill(victim, signal.SIGKILL)
    text = await next_death(client)
    assert "rank 2 (" in text and f"pid {victim}) was killed by signal 9" in text
    await all_gone(tmp_path, client)
    await client.close()


async def test_a_stopped_worker_is_named(tmp_path):
    client = make_client(tmp_path, "stops@1", step_timeout=1.0)
    await client.start()
    await client.send(request())
    text = await next_death(client)
    assert "--step-timeout" in text and "is stopped" in text and "rank 1 never entered it" in text
    await all_gone(tmp_path, client)
    await client.close()


async def test_a_step_in_which_no_rank_gets_on_ends_the_engine_long_before_the_step_may_take(tmp_path):
    client = make_client(tmp_path, "stops@1", stall_timeout=1.0)
    await client.start()
    await client.send(request())
    text = await next_death(client)
    assert "no rank has got on for 1 s (--stall-timeout): rank 1 (" in text
    assert "is stopped" in text and "rank 1 never entered it" in text
    await all_gone(tmp_path, client)
    await client.close()


async def test_a_core_that_waits_for_a_step_goes_on_telling_its_numbers(tmp_path):
    client = make_client(tmp_path, "stops@1", step_timeout=2.0)
    await client.start()
    await client.send(request())
    seen = []
    with pytest.raises(EngineDeadError):
        while True:
            outputs = await client.receive()
            if outputs.stats is not None and not outputs.deltas:
                seen.append(max(rank.seconds_since_progress for rank in outputs.stats.ranks))
    assert len(seen) >= 3 and seen[-1] > 1.0 and seen == sorted(seen)
    await all_gone(tmp_path, client)
    await client.close()


async def test_nothing_is_left_of_a_core_that_was_killed(tmp_path):
    client = make_client(tmp_path)
    await client.start()
    await client.send(request())
    await client.receive()
    os.kill(pids(tmp_path)[1], signal.SIGSTOP)  # it cannot see that its parent is gone
    assert client.process_id is not None
    os.kill(client.process_id, signal.SIGKILL)
    assert "killed by signal 9" in await next_death(client)
    await all_gone(tmp_path, client)
    await client.close()


async def test_a_client_that_gives_up_during_the_start_leaves_nothing(tmp_path):
    client = make_client(tmp_path, "slow-load")
    start = asyncio.create_task(client.start())
    while len(pids(tmp_path)) < 3:
        await asyncio.sleep(0.01)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await all_gone(tmp_path, client)


async def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path):
    client = make_client(tmp_path, "silent@1", startup_timeout=4.0)
    with pytest.raises(StartupError, match=r"start-up phase 'spawn': rank 1 .* did not come within 4 s"):
        await client.start()
    await all_gone(tmp_path, client)
