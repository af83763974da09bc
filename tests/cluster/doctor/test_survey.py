"""The order of a survey, with machines that are plain objects; what it says, and what it keeps for `shoal plan`."""

from __future__ import annotations

import itertools
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.doctor.facts import ClusterFacts, LinkFacts, ModelFile, TorchFacts
from shoal.cluster.doctor.findings import Finding
from shoal.cluster.doctor.links_file import write_links
from shoal.cluster.doctor.render import as_json, as_text, refusal, summary
from shoal.cluster.doctor.services import Opened
from shoal.cluster.doctor.survey import RANKS, Steps, Survey, pair_rounds
from shoal.cluster.doctor.trial import Outcome
from shoal.cluster.plan.links import read_measured
from shoal.cluster.ports import NodePorts
from shoal.errors import NodeError
from tests.cluster.doctor.sound import change, node


class Machine:
    """Answers as it was told. shut: ports of others that do not answer it."""

    def __init__(self, number, facts=None, *, shut=(), fails=(), outcome=None, is_node=True):
        self.facts = facts or node(number)
        self.address, self.is_head, self.is_node = self.facts.address, number == 1, is_node
        self.port = 40000 + number
        self._shut, self._fails, self._outcome = shut, fails, outcome or Outcome(seconds=0.01, num_bytes=4 << 20)
        self.measured, self.ranks, self.closed = [], [], 0

    def _may(self, what):
        if what in self._fails:
            raise NodeError(f"{what} failed", reason="failed")

    def gather(self, request):
        self._may("gather")
        return self.facts

    def clock(self):
        return None if self.is_head else (0.001, 0.002)

    def open(self, tcp, lifetime):
        self._may("open")
        assert 10002 in tcp
        return Opened(self.port, b"n" * 16, 50000, [] if self.is_node else list(tcp))

    def close(self):
        self.closed += 1

    def probe(self, targets):
        return ["dropped" if port in self._shut else "open" for _, port, _ in targets]

    def measure(self, target, opened, seconds):
        self._may("measure")
        self.measured.append((target, opened.port, seconds))
        return LinkFacts(self.address, target, "", 0.001, 1e9 if seconds else 0.0)

    def run_ranks(self, ranks, use_rdma, timeout):
        self._may("ranks")
        self.ranks += ranks
        return [self._outcome] * len(ranks)

    def sums(self, model):
        return {"model.safetensors": f"{self.address:0>64}"}


def survey(machines, steps=None, model=None):
    said = []
    facts = Survey(machines, NodePorts(), said.append).run(model=model, steps=steps or Steps())
    assert {machine.closed for machine in machines if not machine._fails} <= {1}
    return facts, said


def test_all_pairs_are_measured_both_ways():
    machines = [Machine(number) for number in (1, 2, 3)]
    facts, said = survey(machines)
    ways = {(link.source, link.target) for link in facts.links}
    assert ways == set(itertools.permutations([machine.address for machine in machines], 2))
    assert len(facts.clocks) == 2 and facts.silent == {} and len(said) == 4
    assert {each.state for each in facts.reach} == {"open"}
    # A node's own ports are asked for, of the workers' range and of others' what is listened on.
    names = {each.name for each in facts.reach if each.target.startswith("node1")}
    assert names == {"head", "daemon", "beats", "node manager", "object manager", RANKS}
    gloo, nccl = facts.collectives
    assert gloo.state == nccl.state == "ok" and gloo.num_ranks == 3 and nccl.num_ranks == 6
    masters = {(rank.master_address, rank.master_port) for machine in machines for rank in machine.ranks}
    assert masters == {("10.0.0.1", 50000)}
    assert sorted(rank.rank for machine in machines for rank in machine.ranks if rank.backend == "nccl") == [*range(6)]


@pytest.mark.parametrize(("second", "kept"), [(9e8, 9e8), (1e8, 2e8)])
def test_a_way_slower_than_most_is_measured_twice(second, kept):
    machines = [Machine(number) for number in (1, 2, 3)]
    measure, rates = machines[0].measure, iter([2e8, second])

    def measure_slowly(target, opened, seconds):
        found = measure(target, opened, seconds)
        slow = target == machines[1].address
        return msgspec.structs.replace(found, bandwidth_bytes_per_s=next(rates)) if slow else found

    machines[0].measure = measure_slowly
    facts, _ = survey(machines)
    assert len(facts.links) == 6
    assert sorted(link.bandwidth_bytes_per_s for link in facts.links) == [kept, *[1e9] * 5]
    assert [len(machine.measured) for machine in machines] == [3, 2, 2]


def test_a_quick_one_leaves_out_what_takes_time():
    quick = Steps(torch=False, gpus=False, links=False, collectives=False, sums=False)
    machines = [Machine(1), Machine(2)]
    facts, _ = survey(machines, quick, model="m")
    assert facts.collectives == [] and [link.bandwidth_bytes_per_s for link in facts.links] == [0, 0]
    assert {file.sha256 for each in facts.nodes for file in each.model.files} == {""}


@pytest.mark.parametrize("step", ["gather", "open", "measure", "ranks"])
def test_a_machine_that_fails_does_not_stop_the_others(step):
    machines = [Machine(1), Machine(2, fails=(step,)), Machine(3)]
    facts, _ = survey(machines)
    assert list(facts.silent.values()) == [f"{step} failed"]
    assert ("10.0.0.1", "10.0.0.3") in {(link.source, link.target) for link in facts.links}
    if step == "ranks":
        assert facts.collectives[0].state == "failed" and "no word from node2 (10.0.0.2)" in facts.collectives[0].reason


def test_a_way_whose_ports_are_shut_is_not_measured():
    machines = [Machine(1), Machine(2, shut=(40001, 6381))]
    facts, _ = survey(machines)
    assert {(each.name, each.source[:5]) for each in facts.reach if each.state == "dropped"} == {
        (RANKS, "node2"),
        ("node manager", "node2"),
    }
    assert {(link.source, link.target) for link in facts.links} == {("10.0.0.1", "10.0.0.2")}


def test_a_machine_that_joins_is_tried_at_the_ports_that_it_will_have():
    facts, _ = survey([Machine(1), Machine(2, is_node=False)])
    names = {each.name for each in facts.reach if each.target.startswith("node2")}
    assert {"daemon", "node manager", "object manager", "workers", "beats", RANKS} == names


def test_all_reduces_that_cannot_be_or_fail():
    bare = change(node(2), "versions", torch=TorchFacts())
    facts, _ = survey([Machine(1), Machine(2, bare)])
    assert facts.collectives[0].state == "skipped" and "node2" in facts.collectives[0].reason
    facts, _ = survey([Machine(1), Machine(2, outcome=Outcome(error="rank 1 did not come"))])
    gloo, nccl = facts.collectives
    assert gloo.state == "failed" and gloo.reason == "node2 (10.0.0.2): rank 1 did not come" and nccl.state == "skipped"
    cpu = msgspec.structs.replace(node(1).versions.torch, cuda_usable=False)
    facts, _ = survey([Machine(1, change(node(1), "versions", torch=cpu))])
    assert facts.collectives[0].num_ranks == 2 and facts.collectives[1].state == "skipped"


def test_sums_come_to_the_files():
    facts, _ = survey([Machine(1), Machine(2)], model="/models/m")
    sums = [[file.sha256[-8:] for file in each.model.files] for each in facts.nodes]
    assert sums == [["10.0.0.1", "", ""], ["10.0.0.2", "", ""]]


@given(st.integers(min_value=1, max_value=17))
def test_every_pair_meets_once_and_nobody_twice_in_a_round(number):
    rounds = pair_rounds([str(each) for each in range(number)])
    pairs = [frozenset(pair) for each in rounds for pair in each]
    assert len(pairs) == len(set(pairs)) == number * (number - 1) // 2
    for each in rounds:
        members = [member for pair in each for member in pair]
        assert len(members) == len(set(members))


# --- what is shown and kept ------------------------------------------------------------------------------------------

_FINDINGS = [
    Finding("system", "clock", "ok", "node1", "the clock is right"),
    Finding("ports", "open ports", "fail", "node2 → node1", "a firewall drops 6380", "`sudo ufw allow 6380`"),
    Finding("versions", "torch", "skip", "node1", "torch is not installed"),
]


def test_text_and_json():
    text = as_text(_FINDINGS, color=False, width=100)
    assert text.splitlines()[0] == "node1" and "node2 → node1" in text
    assert "  FAIL  open ports" in text and "mend: `sudo ufw allow 6380`" in text
    assert text.endswith("1 failed, 1 ok, 1 skipped") and summary(_FINDINGS[:1]) == "0 failed, 1 ok"
    assert "\033[31m" in as_text(_FINDINGS, color=True, width=100)
    assert refusal(_FINDINGS) == ("  node2 → node1: open ports: a firewall drops 6380\n    mend: `sudo ufw allow 6380`")
    report = json.loads(as_json(_FINDINGS, ClusterFacts(nodes=[node(1)])))
    assert report["ok"] is False and report["counts"] == {"ok": 1, "fail": 1, "skip": 1}
    assert report["findings"][1]["mend"] and report["facts"]["nodes"][0]["hostname"] == "node1"
    again = msgspec.convert(report["facts"], ClusterFacts)
    assert again.nodes == [node(1)] and isinstance(again.nodes[0].model.files[0], ModelFile)


def test_links_are_kept_for_plans(tmp_path):
    def link(source, target, rate, **more):
        return LinkFacts(source, target, round_trip_seconds=0.0004, bandwidth_bytes_per_s=rate, **more)

    assert write_links([link("a", "b", 0.0), link("a", "c", 1e9, error="stalls")], tmp_path) is None
    path = write_links([link("a", "b", 1e9), link("b", "a", 2e9)], tmp_path)
    write_links([link("a", "b", 3e9), link("b", "c", 4e9)], tmp_path)
    pairs = {(pair["from"], pair["to"]): pair for pair in json.loads(path.read_text())["pairs"]}
    assert {way: pair["bandwidth_bytes_per_s"] for way, pair in pairs.items()} == {
        ("a", "b"): 3e9,
        ("b", "a"): 2e9,
        ("b", "c"): 4e9,
    }
    measured = read_measured(path, ["a", "b"], is_cpu=True)
    assert measured.bandwidth == 2e9 and measured.latency == pytest.approx(0.0002)
    path.write_text("damaged")
    assert json.loads(write_links([link("a", "b", 1e9)], tmp_path).read_text())["pairs"]
