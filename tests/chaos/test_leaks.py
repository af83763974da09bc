"""What a run leaves behind is found, and what belongs to somebody is not taken for left behind."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from tests.chaos import leaks
from tests.chaos.cases import make_cases
from tests.chaos.harness import Plan, in_use, scene, strays, undisturbed
from tests.chaos.load import Load


def test_processes_are_found_by_their_variable():
    token = secrets.token_hex(8)
    sleeper = subprocess.Popen(["sleep", "60"], env={**os.environ, leaks.VARIABLE: token})
    try:
        (found,) = leaks.wait_until_gone(token, 0.3)
        assert found == f"{sleeper.pid} sleep 60"
    finally:
        sleeper.kill()
        sleeper.wait(10)
    assert leaks.wait_until_gone(token, 5) == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm here")
def test_shared_memory_that_nobody_holds_is_found():
    footprint = leaks.Footprint()
    segment = Path("/dev/shm") / f"shoal-test-{secrets.token_hex(8)}"
    holder = "import sys; file = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
    segment.write_bytes(b"x")
    try:
        command = [sys.executable, "-c", holder, str(segment)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert str(segment) not in footprint.leaked()
            process.communicate(timeout=20)
        assert str(segment) in footprint.leaked()
    finally:
        segment.unlink()


async def test_requests_and_strays_are_found_while_they_are_there(tmp_path):
    token = secrets.token_hex(8)
    plan = Plan(kinds=("kill_router",), num_replicas=1, concurrency=8)
    cases = make_cases("fake", 12, seed=1)
    async with (
        scene(plan, tmp_path, {leaks.VARIABLE: token}) as (replicas, routers),
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as http,
    ):
        wanted = await undisturbed(http, replicas[0].url, cases, 8)
        load = Load([router.door for router in routers], cases, wanted, random.Random(1), with_keys=True)
        load.start(http, 8)
        await asyncio.sleep(1.0)
        busy = await in_use([*replicas, *routers], 0)
        await load.stop()
        for words in ("KV cache in use", "requests run or wait", "kept_requests is", "backend_requests_running is"):
            assert any(words in one for one in busy), (words, busy)
        assert await in_use(replicas, 10) == []
        assert any("kept_requests is" in one for one in await in_use(routers, 0)), "clients may still come back"
        assert await in_use(routers, 30) == []
        assert not load.failures, load.failures
        assert strays(token, [*replicas, *routers]) == []
        (stray,) = strays(token, replicas[:1] + routers[:1])
        assert "shoal.cli.main router" in stray
