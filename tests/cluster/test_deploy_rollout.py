"""The next step of a rollout, for any state of the replicas: what must never be done."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.deploy.rollout import View, plan_steps

PHASES = ("up", "draining", "stopping")


def view(name: str, revision: str = "new", **changes) -> View:
    values = {"phase": "up", "serving": True, "was_serving": True, "age": 10.0, **changes}
    return View(name=name, revision=revision, **values)


@st.composite
def views(draw) -> list[View]:
    found = []
    for number in range(draw(st.integers(0, 7))):
        serving = draw(st.booleans())
        found.append(
            View(
                name=f"r{number}",
                revision=draw(st.sampled_from(["old", "new"])),
                phase=draw(st.sampled_from(PHASES)),
                serving=serving,
                was_serving=serving or draw(st.booleans()),
                age=draw(st.floats(0, 200)),
                num_early_ends=draw(st.integers(0, 2)),
                running=draw(st.integers(0, 9)),
            )
        )
    return found


@given(views(), st.integers(1, 5), st.integers(1, 5), st.sampled_from(["new", None]))
def test_whatever_the_state(replicas, wanted, minimum, target):
    steps = plan_steps(replicas, target, wanted, minimum=min(minimum, wanted), start_timeout=100)
    up = {each.name: each for each in replicas if each.phase == "up"}
    assert set(steps.drain) <= set(up), "what is going already is let go"
    if target is None:
        assert set(steps.drain) == set(up) and not steps.num_start
        return
    assert not (steps.num_start and steps.drain), "one thing at a time"
    if steps.failure:
        assert steps.failed and all(up[name].revision == "new" for name in steps.failed)
        assert not steps.num_start and not steps.drain and not steps.settled
        return
    left = [each for name, each in up.items() if name not in steps.drain]
    serving = sum(each.serving for each in up.values())
    assert sum(each.serving for each in left) >= min(serving, wanted), "those that serve are not fewer than wanted"
    old = any(each.revision == "old" for each in up.values())
    assert len(left) + steps.num_start <= max(wanted + old, len(up)), "one more than wanted at most"
    if steps.settled:
        assert len(replicas) == len(up) == wanted and serving == wanted and not old
    if steps.stands:
        assert not old and serving >= min(minimum, wanted)


@given(views(), st.integers(1, 4))
def test_every_start_ends_well_when_all_come_up(replicas, wanted):
    """A world in which all works: each step brings it nearer, and it settles."""
    world = {each.name: each for each in replicas if not each.num_early_ends}
    for number in range(60):
        # What was under way has happened: those that went are gone, those that were started serve.
        world = {
            name: View(**{**_fields(each), "serving": True, "was_serving": True})
            for name, each in world.items()
            if each.phase == "up"
        }
        steps = plan_steps(list(world.values()), "new", wanted, minimum=1, start_timeout=1000)
        if steps.settled:
            break
        for name in steps.drain:
            world[name] = View(**{**_fields(world[name]), "phase": "draining"})
        for index in range(steps.num_start):
            name = f"n{number}-{index}"
            world[name] = view(name, serving=False, was_serving=False, age=0.0)
    assert steps.settled and len(world) == wanted and {each.revision for each in world.values()} <= {"new"}


def _fields(each: View) -> dict:
    return {name: getattr(each, name) for name in View.__struct_fields__}


def test_a_surplus_goes_by_what_it_is_worth():
    replicas = [view("busy", running=3), view("starting", serving=False, was_serving=False, age=1.0), view("idle")]
    assert plan_steps(replicas, "new", 2, minimum=1, start_timeout=100).drain == ("starting",)
    assert plan_steps(replicas, "new", 1, minimum=1, start_timeout=100).drain == ("starting", "idle")


def test_the_old_one_waits_for_the_new_one():
    old = [view("a", "old"), view("b", "old")]
    assert plan_steps(old, "new", 2, minimum=1, start_timeout=100).num_start == 1
    coming = view("c", serving=False, was_serving=False)
    assert plan_steps([*old, coming], "new", 2, minimum=1, start_timeout=100).drain == ()
    assert plan_steps([*old, view("c")], "new", 2, minimum=1, start_timeout=100).drain == ("a",)
    going = [view("a", "old", phase="draining"), view("b", "old"), view("c")]
    steps = plan_steps(going, "new", 2, minimum=1, start_timeout=100)
    assert steps.num_start == 0 and not steps.drain, "the place of the one that goes is not free yet"


def test_reasons_of_a_failure():
    late = view("a", serving=False, was_serving=False, age=101.0, why="the server is starting")
    assert plan_steps([late], "new", 1, minimum=1, start_timeout=100).failure == (
        "a was not ready after 100 s: the server is starting"
    )
    broken = view("b", serving=False, was_serving=False, num_early_ends=2, why="ended with 1: shoal: error: no")
    steps = plan_steps([view("a"), broken], "new", 2, minimum=1, start_timeout=100)
    assert steps.failed == ("b",) and steps.failure.endswith("ended with 1: shoal: error: no")
    was = view("c", serving=False, num_early_ends=5, age=1000.0)
    assert not plan_steps([was], "new", 1, minimum=1, start_timeout=100).failure, "it was up: it comes back"
