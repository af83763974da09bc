"""What `shoal serve` refuses before it starts on several machines."""

from __future__ import annotations

import time

import pytest

from shoal.cluster.doctor import preflight
from shoal.cluster.doctor.facts import WayFacts
from shoal.cluster.doctor.findings import FAIL, WARN
from shoal.cluster.doctor.preflight import check_before_serving, is_wanted
from shoal.config.parallel import ParallelConfig
from shoal.errors import StartupError
from tests.cluster.doctor.model_files import write_model
from tests.cluster.doctor.sound import change, node

_TWO = ParallelConfig(backend="mp", num_nodes=2, tensor_size=2, master_address="127.0.0.1")


def test_one_machine_needs_none():
    assert not is_wanted(ParallelConfig()) and not is_wanted(ParallelConfig(backend="mp", tensor_size=2))
    assert is_wanted(_TWO) and is_wanted(ParallelConfig(backend="ray", tensor_size=2))


def test_it_takes_a_part_of_a_second_and_lets_a_whole_model_through(tmp_path):
    directory = write_model(tmp_path / "model", num_shards=40)
    check_before_serving(str(directory), _TWO, has_weights=True)  # what has to be loaded for it is loaded
    taken = []
    for _ in range(3):
        start = time.monotonic()
        check_before_serving(str(directory), _TWO, has_weights=True)
        taken.append(time.monotonic() - start)
    assert min(taken) < 0.5


def test_it_refuses_with_the_doctors_words(tmp_path):
    directory = write_model(tmp_path / "model")
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(StartupError, match=r"shards: model-00002-of-00003.safetensors: named in the index") as caught:
        check_before_serving(str(directory), _TWO, has_weights=True)
    assert "--skip-preflight" in str(caught.value) and "mend: copy it again" in str(caught.value)
    # Random weights need no files.
    check_before_serving(str(directory), _TWO, has_weights=False)


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_head_that_is_silent_is_tried_for_longer_before_it_is_a_reason_to_refuse(monkeypatch, is_lost):
    """Where packets are lost, the first is now and then."""
    tried = []

    def gather_network(head, address, *, timeout):
        tried.append(timeout)
        states = ["dropped", "open" if is_lost else "dropped"]
        state = states[min(len(tried), 2) - 1]
        way = WayFacts("10.0.0.1", "eth0", state)
        return change(at("10.0.0.9:6379"), "network", address="10.0.0.1", ways=[way]).network

    monkeypatch.setattr(preflight, "gather_network", gather_network)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    monkeypatch.setattr(preflight, "read_record", lambda: None)
    ray = ParallelConfig(backend="ray", tensor_size=2)
    if is_lost:
        check_before_serving("m", ray, has_weights=False)
    else:
        with pytest.raises(StartupError, match="the head 10.0.0.9:6379 does not answer"):
            check_before_serving("m", ray, has_weights=False)
    assert len(tried) == 2 and tried[1] > 5 * tried[0]
    # Without Ray machines come in any order: silence says nothing, and nobody waits for it.
    tried.clear()
    two = ParallelConfig(backend="mp", num_nodes=2, tensor_size=2, master_address="10.0.0.9")
    check_before_serving("m", two, has_weights=False)
    assert len(tried) == 1


def at(head):
    return change(node(1), "network", head=head)


def statuses(here, peers=(), uses_ray=False):
    return {
        (finding.check, finding.status)
        for finding in preflight._examine(here, peers, uses_ray=uses_ray)
        if finding.status in (FAIL, WARN)
    }


def test_an_interface_that_is_not_there():
    facts = change(at("10.0.0.9:29500"), "network", variables={"NCCL_SOCKET_IFNAME": "ib7"})
    assert statuses(facts) == {("variables", FAIL)}


def test_machines_may_come_in_any_order():
    """The master's silence is no fault without Ray, as nobody knows yet who is up; Ray's head must be there."""
    silent = change(node(1), "network", head="10.0.0.9:29500", ways=[WayFacts("10.0.0.1", "eth0", "dropped")])
    assert statuses(silent) == set()
    assert statuses(silent, uses_ray=True) == {("route", FAIL)}
    astray = change(
        silent,
        "network",
        address="192.168.7.1",
        interfaces=silent.network.interfaces,
        ways=[WayFacts("192.168.7.1", "eth1", "dropped"), WayFacts("10.0.0.1", "eth0", "refused")],
    )
    assert ("route", FAIL) in statuses(astray)


def test_all_on_one_machine():
    alone = change(node(1), "network", address="127.0.0.1", interface="lo", head="127.0.0.1:29500")
    assert statuses(alone) == set()
    # Of a cluster that Ray finds by itself, nobody knows the head, nor which address leads to it.
    lost = change(node(1), "network", address="", interface="", head="", error="several networks")
    assert statuses(lost, uses_ray=True) == set()
    assert ("address", FAIL) in statuses(change(lost, "network", head="10.0.0.9:6379"), uses_ray=True)


def test_other_nodes():
    lacking = change(node(2), "model", missing=["model-2.safetensors"])
    other = change(node(3), "versions", shoal="0.9.0")
    assert statuses(at("10.0.0.9:6379"), [node(2)], uses_ray=True) == set()
    # A node that the model may not need is only warned of; one of another version would not understand.
    assert statuses(at("10.0.0.9:6379"), [lacking], uses_ray=True) == {("shards", WARN)}
    assert statuses(at("10.0.0.9:6379"), [other], uses_ray=True) == {("same shoal", FAIL)}
