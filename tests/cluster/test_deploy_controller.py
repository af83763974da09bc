"""The controller in a world of its own: replicas come, serve, are replaced and go; what must hold meanwhile."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from shoal.cluster.deploy.controller import RETRY_SECONDS
from shoal.cluster.deploy.launches import resources
from shoal.cluster.deploy.records import Deployment
from shoal.config.deploy_file import Layout, RouterPlan
from shoal.errors import ConfigError
from tests.cluster.fake_fleet import World, make_plan

forgetful = pytest.mark.parametrize("forgetful", [False, True], ids=["one controller", "a new one for each look"])


@forgetful
def test_a_deployment_comes_up_with_the_fewest(forgetful):
    world = World(make_plan(minimum=2), forgetful=forgetful)
    world.run(6)
    assert world.fleet.starts == ["m-1", "m-2"] == world.fleet.serving()
    assert world.model().settled or forgetful
    file = world.fleet.file
    assert file["policy"] == "round-robin" and "golden_prompt" not in file
    assert file["backends"][0] == {"url": "http://m-1:1", "models": ["m"], "kind": "shoal", "api_key": "k"}
    launch = world.fleet.replicas["m-1"].launch
    assert launch.flags == ["good", "--served-model-name=m", "--device=cpu"]
    assert launch.variables == {"SHOAL_API_KEY": "k"}, "the key is not on the command line"
    world.run(30)
    assert world.fleet.starts == ["m-1", "m-2"] and not world.fleet.stops


def test_load_brings_replicas_and_calm_takes_them_one_by_one():
    world = World(make_plan())
    world.run(5)
    world.fleet.replicas["m-1"].num_waiting = 20
    world.fleet.replicas["m-1"].num_running = 4
    world.run(10)
    assert world.fleet.serving() == ["m-1", "m-2", "m-3"]
    world.fleet.replicas["m-1"].num_waiting = 0
    world.fleet.replicas["m-1"].num_running = 1
    seen = []
    for _ in range(40):
        world.step()
        seen.append(len(world.fleet.serving()))
    assert sorted(set(seen), reverse=True) == [3, 2, 1]
    assert world.fleet.serving() == ["m-1"], "the one with something to do stays"
    assert set(world.fleet.replicas) == {"m-1"}


def test_what_is_drained_ends_when_nothing_runs_there():
    world = World(make_plan(minimum=2))
    world.run(5)
    for replica in world.fleet.replicas.values():
        replica.num_running = 3
    world.controller.apply(make_plan(minimum=1, maximum=1))
    world.run(10)
    assert len(world.fleet.serving()) == 1 and not world.fleet.stops
    (drained,) = set(world.fleet.replicas) - set(world.fleet.serving())
    assert [each.state for each in world.model().replicas if each.name == drained] == ["draining"]
    world.fleet.replicas[drained].num_running = 0
    world.run(2)
    assert world.fleet.stops == [drained] and drained not in world.fleet.replicas


def test_what_never_becomes_idle_ends_in_time():
    world = World(make_plan(minimum=2))
    world.run(5)
    for replica in world.fleet.replicas.values():
        replica.num_running = 3
    world.controller.apply(make_plan(minimum=1, maximum=1))
    world.run(29)
    assert not world.fleet.stops
    world.run(5)
    assert len(world.fleet.stops) == 1


def test_without_a_word_of_the_router_the_servers_own_counts():
    world = World(make_plan(minimum=2))
    world.run(5)
    for replica in world.fleet.replicas.values():
        replica.num_running = 1
    world.fleet.router_answers = False
    world.controller.apply(make_plan(minimum=1, maximum=1))
    world.run(5)
    assert not world.fleet.stops
    for replica in world.fleet.replicas.values():
        replica.num_running = 0
    world.run(2)
    assert len(world.fleet.stops) == 1


@forgetful
def test_a_changed_plan_replaces_one_at_a_time(forgetful):
    world = World(make_plan(minimum=3), forgetful=forgetful)
    world.run(6)
    old = set(world.fleet.serving())
    world.controller.apply(make_plan(minimum=3, serve={"device": "cpu", "seed": 1}))
    golden = set()
    for _ in range(100):
        world.step()
        assert len(world.fleet.serving()) >= 3
        assert len(world.fleet.replicas) <= 4
        assert not set(world.fleet.stops) & set(world.fleet.serving())
        golden.add(world.fleet.file.get("golden_prompt"))
    assert world.fleet.serving() == ["m-4", "m-5", "m-6"] and old == {"m-1", "m-2", "m-3"}
    assert golden == {None, "off"} and "golden_prompt" not in world.fleet.file
    assert sorted(world.fleet.stops) == ["m-1", "m-2", "m-3"]


@forgetful
def test_a_plan_that_does_not_come_up_is_taken_back(forgetful):
    world = World(make_plan(minimum=2), forgetful=forgetful)
    world.run(6)
    world.controller.apply(make_plan(minimum=2, model="broken"))
    for _ in range(40):
        world.step()
        assert len(world.fleet.serving()) == 2
    assert world.fleet.starts == ["m-1", "m-2", "m-3"] and world.fleet.serving() == ["m-1", "m-2"]
    model = world.model()
    assert "m-3 ended before it was ready: it is broken" in model.failure
    # The next plan counts again.
    world.controller.apply(make_plan(minimum=2, serve={"device": "cpu", "seed": 1}))
    world.run(60)
    assert world.fleet.serving() == ["m-4", "m-5"] and not world.model().failure


def test_one_that_the_router_does_not_let_in_is_no_success():
    world = World(make_plan(minimum=1))
    world.run(6)
    world.fleet.left_out.add("m-2")
    world.controller.apply(make_plan(minimum=1, serve={"device": "cpu", "seed": 1}))
    world.run(59)
    assert world.fleet.serving() == ["m-1"] and not world.model().failure
    world.run(5)
    assert "m-2 was not ready after 60 s: the router leaves it out: gives wrong answers" in world.model().failure
    assert world.fleet.serving() == ["m-1"] and set(world.fleet.replicas) == {"m-1"}


def test_a_first_plan_that_does_not_come_up_is_given_up():
    world = World(make_plan(model="broken"))
    world.run(20)
    assert world.fleet.starts == ["m-1"] and not world.fleet.replicas
    assert "it is broken" in world.model().failure


def test_what_has_no_room_is_tried_again_later():
    world = World(make_plan())
    world.run(6)
    world.fleet.rooms = 1
    world.fleet.replicas["m-1"].num_waiting = 20
    world.run(63)
    assert world.fleet.starts == ["m-1", "m-2", "m-3"], "they wait for room"
    world.run(5)
    assert set(world.fleet.replicas) == {"m-1"} and "none is added for 26 s, since m-3 was not" in world.model().why
    assert not world.model().failure and world.fleet.serving() == ["m-1"]
    world.fleet.rooms = 9
    world.run(RETRY_SECONDS + 10)
    assert len(world.fleet.serving()) == 3


@forgetful
def test_a_replica_whose_actor_is_gone_is_replaced(forgetful):
    world = World(make_plan(minimum=2), forgetful=forgetful)
    world.run(6)
    del world.fleet.replicas["m-1"]
    world.run(6)
    assert world.fleet.serving() == ["m-2", "m-3"]


def test_a_router_that_is_away_for_long_fails_no_replica():
    world = World(make_plan(minimum=2), forgetful=True)
    world.run(6)
    world.fleet.router_answers = False
    world.run(200)
    assert world.fleet.starts == ["m-1", "m-2"] and not world.fleet.stops


def test_models_come_and_go():
    world = World(make_plan())
    world.run(6)
    both = dataclasses.replace(make_plan(), models=make_plan().models + make_plan(name="n").models)
    world.controller.apply(both)
    world.run(6)
    assert {entry["models"][0] for entry in world.fleet.file["backends"]} == {"m", "n"}
    world.controller.apply(make_plan(name="n"))
    world.run(10)
    assert world.fleet.serving() == ["n-2"] and [each.name for each in world.controller.status(0).models] == ["n"]


def test_a_stop_ends_the_router_first_and_leaves_nothing():
    world = World(make_plan(minimum=2))
    world.run(6)
    world.controller.begin_stop()
    world.step()
    world.step()
    assert world.fleet.router_stops_at is not None and not world.fleet.stops, "its requests finish first"
    world.run(5)
    assert not world.fleet.replicas and not world.fleet.router_up
    assert world.controller.status(world.fleet.now).stopped
    with pytest.raises(ConfigError, match="is being stopped"):
        world.controller.apply(make_plan())


def test_what_is_told_is_written_down_at_once():
    world = World(make_plan())
    world.run(6)
    world.controller.apply(make_plan(model="other"))
    saved = msgspec.json.decode(world.fleet.saved, type=Deployment)
    assert saved.models["m"].plan.model == "other"
    world.controller.begin_stop()
    assert msgspec.json.decode(world.fleet.saved, type=Deployment).stopping


def test_where_the_router_listens_cannot_change():
    world = World(make_plan())
    world.run(3)
    moved = dataclasses.replace(make_plan(), router=RouterPlan(options={"port": 9001}))
    with pytest.raises(
        ConfigError, match=r"listens on 127.0.0.1:9000; to have it on 127.0.0.1:9001, `shoal deploy stop`"
    ):
        world.controller.apply(moved)


def test_what_was_saved_is_what_there_is():
    world = World(make_plan(minimum=2))
    world.run(6)
    before = world.fleet.saved
    world.run(10)
    assert world.fleet.saved == before, "nothing is written while nothing changes"
    saved = msgspec.json.decode(before, type=Deployment)
    assert set(saved.replicas) == {"m-1", "m-2"} and saved.next_number == 3
    assert saved.models["m"].stable == make_plan(minimum=2).models[0]


@pytest.mark.parametrize(
    ("layout", "serve", "has_gpus", "expected"),
    [
        (Layout(), {"device": "cpu"}, True, (0, 1)),
        (Layout(tensor_parallel_size=2), {"device": "cpu"}, True, (0, 2)),
        (Layout(tensor_parallel_size=2, data_parallel_size=2), {}, True, (4, 1)),
        (Layout(tensor_parallel_size=2, data_parallel_size=2), {}, False, (0, 4)),
        (Layout(), {"device": "cuda"}, False, (1, 1)),
        (Layout(num_gpus=0, num_cpus=0.5), {}, True, (0, 0.5)),
        (Layout(tensor_parallel_size=8), {"distributed_executor_backend": "ray"}, True, (0, 1)),
    ],
)
def test_what_ray_sets_apart(layout, serve, has_gpus, expected):
    assert resources(make_plan(layout=layout, serve=serve).models[0], has_gpus=has_gpus) == expected
