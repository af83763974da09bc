from __future__ import annotations

import asyncio
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config.router_settings import BackendSpec
from shoal.errors import NotFoundError
from shoal.router.backend import Health
from shoal.router.breaker import FAILURES
from shoal.router.flight import Flight
from shoal.router.policies import RequestView, create_policy
from shoal.router.pool import Pool


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_pool(*specs: BackendSpec, aliases=None, policy: str = "round-robin") -> Pool:
    pool = Pool(create_policy(policy, random=Random(1)), Random(1), Time())
    pool.apply(specs, aliases or {})
    for backend in pool:
        backend.health, backend.entered = Health(True, True, True, ""), True
        backend.native = backend.native if backend.native is not None else True
    return pool


def spec(name: str, *models: str, **given) -> BackendSpec:
    return BackendSpec(url=f"http://{name}", models=models or ("m",), **given)


def urls(backends) -> list[str]:
    return [backend.url.removeprefix("http://") for backend in backends]


def test_models_and_aliases():
    pool = make_pool(spec("a", "m"), spec("b", "m", "n"), aliases={"gpt": "m", "lost": "gone"})
    assert pool.models() == ["m", "n", "gpt"]
    assert (pool.resolve("m"), pool.resolve("gpt"), pool.resolve("n")) == ("m", "m", "n")
    with pytest.raises(NotFoundError, match="the model 'x' is not served here; there is m, n, gpt"):
        pool.resolve("x")
    with pytest.raises(NotFoundError, match="name a model; there is m, n, gpt"):
        pool.resolve(None)
    assert make_pool(spec("a", "m"), aliases={"gpt": "m"}).resolve(None) == "m"


def test_who_may_be_sent_a_request():
    pool = make_pool(spec("a"), spec("b", kind="openai"), spec("c", "n"), spec("d"))
    a, b, c, d = pool
    assert urls(pool.candidates("m")) == ["a", "b", "d"]
    assert urls(pool.candidates("m", {a})) == ["b", "d"]
    assert urls(pool.candidates("m", native=True)) == ["a", "d"]
    assert urls(pool.candidates("m", native=False)) == ["b"]
    a.draining = True
    d.leave("it stalled")
    assert urls(pool.candidates("m")) == ["b"]
    assert (a.why_out(0), d.why_out(0), b.why_out(0)) == ("is drained by an operator", "it stalled", None)
    for _ in range(FAILURES):
        b.breaker.failed(0.0)
    assert pool.candidates("m") == [] and "breaker is open" in b.why_out(0)
    assert 0 < pool.seconds_until_trial("m") < 1 and pool.seconds_until_trial("n") is None
    c.health = Health(True, False, True, "no progress")
    assert pool.candidates("n") == [] and c.why_out(0) == "no progress"


def test_new_settings():
    pool = make_pool(spec("a"), spec("b"), spec("c"))
    a, b, c = pool
    added, gone = pool.apply([spec("c", weight=3.0), spec("d"), spec("b", "n")], {})
    assert urls(pool) == ["c", "d", "b"] and pool.get("http://c") is c and c.view.weight == 3.0
    assert urls(added) == ["d", "b"] and set(gone) == {a, b}
    assert a.removed and not a.available and c.available


async def test_what_runs_on_a_backend_that_is_gone_stays_watched():
    pool = make_pool(spec("a"), spec("b"))
    a, _ = pool
    flight = Flight(a, "m", RequestView("1"), pool.policy)
    pool.apply([spec("b")], {})
    assert a in pool.with_flights()
    flight.end()
    assert a not in pool.with_flights()


async def test_waiting_ends_with_a_change_or_with_the_time():
    pool = make_pool(spec("a"))
    waiting = asyncio.create_task(pool.wait_change(60))
    await asyncio.sleep(0)
    pool.changed()
    await asyncio.wait_for(waiting, 5)
    await asyncio.wait_for(pool.wait_change(0.001), 5)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 40), st.integers(0, 60)), max_size=30))
def test_counts_are_right_whatever_runs(requests):
    """Requests with wrong estimates, ended in any order: what is left is nothing."""

    async def run() -> None:
        pool = make_pool(spec("a"), spec("b"), spec("c"), policy="least-outstanding-tokens")
        backends, flights = list(pool), []
        for number, (place, prompt, output, tokens) in enumerate(requests):
            view = RequestView(str(number), num_prompt_tokens=prompt, num_output_tokens=output)
            flight = Flight(backends[place], "m", view, pool.policy)
            flights.append(flight)
            assert backends[place].view.outstanding_tokens >= view.num_prompt_tokens
            for _ in range(tokens):
                flight.progress(1, 1.0)
        for backend in backends:
            assert backend.view.num_running == len(backend.flights) and backend.view.outstanding_tokens >= 0
        for flight in Random(len(requests)).sample(flights, len(flights)):
            flight.end()
        for backend in backends:
            assert (backend.view.num_running, backend.view.outstanding_tokens) == (0, 0)

    asyncio.run(run())


async def test_speed_is_that_of_streams():
    pool = make_pool(spec("a"))
    (a,) = pool
    flight = Flight(a, "m", RequestView("1"), pool.policy)
    for number in range(11):
        flight.progress(1, number / 10)
    flight.end()
    assert a.view.speed == pytest.approx(10.0)
