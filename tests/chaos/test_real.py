"""Faults of the real engine: shoal-tiny, two replicas of two ranks each on the CPU, in the deterministic mode."""

from __future__ import annotations

import pytest

from tests.chaos.harness import Plan
from tests.chaos.test_quick import run_and_check


@pytest.mark.timeout(600)
@pytest.mark.slow
async def test_a_worker_is_killed_and_another_stopped():
    kinds = ("kill_worker", "kill_core", "stop_worker", "kill_server")
    await run_and_check(
        Plan(engine="real", num_faults=len(kinds), kinds=kinds, concurrency=16, num_cases=24, max_tokens=32)
    )


@pytest.mark.timeout(600)
@pytest.mark.slow
async def test_every_server_is_restarted_in_turn_and_a_router_is_killed():
    kinds = ("rolling_restart", "kill_router")
    await run_and_check(
        Plan(engine="real", num_faults=len(kinds), kinds=kinds, concurrency=16, num_cases=24, max_tokens=32)
    )
