"""When the wait for a server is too long: by a clock of the test's own."""

from __future__ import annotations

import asyncio

import pytest

from shoal.router.flight import Flight
from shoal.router.outcome import DeadlineError, Lost
from shoal.router.policies import RequestView
from shoal.router.watch import look, watch_forever
from tests.router.test_pool import make_pool, spec

STALL = 5.0


class Wait:
    """A request that waits for its server, until something ends the wait."""

    def __init__(self, pool, backend, *, by_frames=True, has_beats=True, deadline=60.0):
        self.error = None
        self.flight = None
        self.task = asyncio.create_task(self._run(pool, backend, by_frames, has_beats, deadline))

    async def _run(self, pool, backend, by_frames, has_beats, deadline):
        flight = self.flight = Flight(backend, "m", RequestView("1"), pool.policy)
        flight.by_frames, flight.has_beats, flight.deadline = by_frames, has_beats, deadline
        flight.patience = STALL
        flight.waiting_since = pool.clock()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.error = flight.take_interrupt()
            if self.error is None:
                raise
        finally:
            flight.end()


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def pool():
    pool = make_pool(spec("a"), spec("b"))
    yield pool
    for backend in pool:
        for flight in tuple(backend.flights):
            flight._task.cancel()
    await settle()


async def wait_on(pool, *waits):
    await settle()
    return waits if len(waits) > 1 else waits[0]


async def look_at(pool, now):
    pool.clock.now = now
    look(pool, STALL)
    await settle()


@pytest.mark.parametrize("has_beats", [True, False])
async def test_silence_leaves_a_server_out_and_moves_all_its_requests(pool, has_beats):
    a, b = pool
    one, two, other = await wait_on(
        pool, Wait(pool, a, has_beats=has_beats), Wait(pool, a, has_beats=has_beats), Wait(pool, b)
    )
    other.flight.last_sign = 4.0
    await look_at(pool, STALL)
    assert one.error is None and a.available
    await look_at(pool, STALL + 0.1)
    assert isinstance(one.error, Lost) and isinstance(two.error, Lost) and not a.available
    assert other.error is None and b.available


async def test_one_silent_connection_of_many_is_the_connections_fault(pool):
    a, _ = pool
    dead, live = await wait_on(pool, Wait(pool, a), Wait(pool, a))
    live.flight.last_sign = STALL
    await look_at(pool, STALL + 0.1)
    assert isinstance(dead.error, Lost) and not dead.error.stalled
    assert live.error is None and a.available


async def test_a_slow_client_is_not_the_servers_silence(pool):
    a, _ = pool
    wait = await wait_on(pool, Wait(pool, a))
    wait.flight.waiting_since = None
    await look_at(pool, 100.0)
    wait.flight.begin_wait(100.0)
    await look_at(pool, 100.0 + STALL)
    assert wait.error is None and a.available


async def test_an_answer_by_text_may_be_silent(pool):
    a, b = pool
    wait = await wait_on(pool, Wait(pool, a, by_frames=False, has_beats=False))
    b.draining = True
    await look_at(pool, 59.0)
    assert wait.error is None
    b.draining = False
    await look_at(pool, 59.5)
    assert isinstance(wait.error, Lost) and "has not begun" in str(wait.error) and a.available


async def test_the_deadline(pool):
    a, _ = pool
    wait = await wait_on(pool, Wait(pool, a, deadline=10.0))
    for now in range(1, 10):
        wait.flight.last_sign = float(now)
        await look_at(pool, float(now))
    assert wait.error is None
    wait.flight.last_sign = 10.1
    await look_at(pool, 10.1)
    assert isinstance(wait.error, DeadlineError) and a.available


async def test_a_server_that_probes_find_dead(pool):
    a, _ = pool
    wait = await wait_on(pool, Wait(pool, a, by_frames=False, has_beats=False))
    a.health.alive, a.dead_since = False, 3.0
    await look_at(pool, 8.0)
    assert wait.error is None
    await look_at(pool, 8.5)
    assert isinstance(wait.error, Lost)


async def test_a_client_that_goes_at_the_same_moment_is_gone(pool):
    a, _ = pool
    wait = await wait_on(pool, Wait(pool, a))
    pool.clock.now = STALL + 1
    look(pool, STALL)
    wait.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await wait.task
    assert wait.error is None and not a.flights


async def test_a_router_that_was_held_up_blames_nobody(pool):
    a, _ = pool
    wait = await wait_on(pool, Wait(pool, a))
    watching = asyncio.create_task(watch_forever(pool, lambda: 0.04))
    await asyncio.sleep(0)
    pool.clock.now = 100.0  # between two looks
    await asyncio.sleep(0.03)
    assert wait.error is None and wait.flight.last_sign == 100.0
    watching.cancel()
