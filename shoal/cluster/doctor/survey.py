"""Looks at several machines and at what is between them: phase after phase, each with a deadline.

A machine that fails in a phase is left out of the next ones, with its reason; the others go on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

from shoal.cluster.doctor.facts import ClockFacts, ClusterFacts, CollectiveFacts, LinkFacts, NodeFacts, PortReach
from shoal.cluster.doctor.links import outliers
from shoal.cluster.doctor.participants import Participant
from shoal.cluster.doctor.services import GatherRequest, Opened
from shoal.cluster.doctor.trial import Outcome
from shoal.cluster.ports import NodePorts, Port, needed_between_nodes
from shoal.cluster.reach import OPEN, REFUSED, sample
from shoal.errors import ShoalError
from shoal.messages import TrialOrder

T = TypeVar("T")
# Of all measurements of links together, whatever the number of machines.
_LINKS_SECONDS = 60.0
_LONGEST_LINK_SECONDS = 1.0
_SHORTEST_LINK_SECONDS = 0.1
# Ways that are slower than most are measured again, unless they are so many that chance is not why.
_MOST_REPEATED = 8
_LIFETIME_SECONDS = 300.0
_TRIAL_SECONDS = 12.0
_TRIAL_BYTES = 4 << 20
# What stands for the ports at which ranks meet: any that is free.
RANKS = "ranks, at any free port"


@dataclasses.dataclass(frozen=True)
class Steps:
    """What is done of what takes time: load torch, ask nvidia-smi, measure links in full, try an all-reduce, hash."""

    torch: bool = True
    gpus: bool = True
    links: bool = True
    collectives: bool = True
    sums: bool = True


class Survey:
    """Of machines, by name in messages as they call themselves. `say`: is told what is done now."""

    def __init__(self, participants: Sequence[Participant], ports: NodePorts, say: Callable[[str], None]) -> None:
        self._all = list(participants)
        self._ports, self._say = ports, say
        self._silent: dict[str, str] = {}
        self._nodes: dict[str, NodeFacts] = {}

    def run(self, *, model: str | None, steps: Steps) -> ClusterFacts:
        """model: to look for on each."""
        request = GatherRequest(model, steps.torch, steps.gpus)
        self._say(f"asking {len(self._all)} machine{'s' * (len(self._all) > 1)} what they have")
        self._nodes = self._each(self._all, lambda one: one.gather(request))
        answering = [one for one in self._all if one.address in self._nodes]
        clocks = self._each(answering, lambda one: one.clock())
        reach: list[PortReach] = []
        links: list[LinkFacts] = []
        collectives: list[CollectiveFacts] = []
        # Whom no packets reach has a finding of its own for that, and would only make every measurement wait.
        if reachable := [one for one in answering if one.address and not _is_astray(self._nodes[one.address])]:
            opened = self._each(reachable, self._open)
            try:
                if len(reachable) > 1:
                    self._say("trying every port between them")
                reach, passing = self._reach(reachable, opened)
                if len(reachable) > 1:
                    self._say("measuring the links between them")
                links = self._links(reachable, opened, passing, steps.links)
            finally:
                self._each(reachable, lambda one: one.close())
            if steps.collectives:
                self._say("trying an all-reduce")
                collectives = self._collectives(reachable, opened)
        if model is not None and steps.sums and len(self._nodes) > 1:
            self._say("comparing the model's files")
            self._hash([one for one in answering if self._has_model(one.address)], model)
        return ClusterFacts(
            nodes=list(self._nodes.values()),
            silent=self._silent,
            clocks=[ClockFacts(self._name(address), *clock) for address, clock in clocks.items() if clock],
            reach=reach,
            links=links,
            collectives=collectives,
        )

    def _has_model(self, address: str) -> bool:
        facts = self._nodes[address].model
        return facts is not None and bool(facts.path)

    def _hash(self, having: Sequence[Participant], model: str) -> None:
        """Sums go to where the files' other facts are."""
        for address, sums in self._each(having, lambda one: one.sums(model)).items():
            node = self._nodes[address]
            assert node.model is not None
            files = [msgspec.structs.replace(file, sha256=sums.get(file.name, "")) for file in node.model.files]
            changed = msgspec.structs.replace(node.model, files=files)
            self._nodes[address] = msgspec.structs.replace(node, model=changed)

    def _each(self, participants: Sequence[Participant], call: Callable[[Participant], T]) -> dict[str, T]:
        """What `call` gives for each, at once, by address. Who raises is silent from then on."""
        if not participants:
            return {}

        def one(participant: Participant) -> T | ShoalError:
            try:
                return call(participant)
            except ShoalError as error:
                return error

        found: dict[str, T] = {}
        with ThreadPoolExecutor(len(participants)) as pool:
            for participant, result in zip(participants, pool.map(one, participants), strict=True):
                if isinstance(result, ShoalError):
                    self._silent.setdefault(self._name(participant.address), str(result))
                else:
                    found[participant.address] = result
        return found

    def _name(self, address: str) -> str:
        return self._nodes[address].name if address in self._nodes else address

    def _open(self, one: Participant) -> Opened:
        """Where no node runs, its ports are free, and are listened on meanwhile; of the workers' range, some are."""
        numbers = [number for port in self._needed(one) for number in sample(port) if port.protocol == "tcp"]
        return one.open(numbers, _LIFETIME_SECONDS)

    def _needed(self, one: Participant) -> list[Port]:
        return list(needed_between_nodes(self._ports, is_head=one.is_head))

    def _reach(
        self, participants: Sequence[Participant], opened: Mapping[str, Opened]
    ) -> tuple[list[PortReach], set[tuple[str, str]]]:
        """From each to each; and the ways (addresses) on which any free port is open, so that links can be measured."""
        listed: dict[str, list[tuple[str, int, str]]] = {}  # name, number, protocol
        for target in participants:
            if target.address not in opened:
                continue
            mine = opened[target.address]
            names = [(RANKS, mine.port, "tcp")]
            for port in self._needed(target):
                # What nobody listens on says nothing: a machine that is no node, where a stranger holds the port.
                names += [
                    (port.name, number, port.protocol)
                    for number in sample(port)
                    if number in mine.open_tcp or port.protocol == "udp" or (target.is_node and port.first == port.last)
                ]
            listed[target.address] = names

        def look(source: Participant) -> dict[tuple[str, int, str], str]:
            targets = [
                (address, number, protocol)
                for address, names in listed.items()
                if address != source.address
                for _, number, protocol in names
            ]
            return dict(zip(targets, source.probe(targets), strict=True))

        reach, passing = [], set()
        for source, states in self._each(participants, look).items():
            for target_address, names in listed.items():
                if target_address == source:
                    continue
                for name, number, protocol in names:
                    state = states[(target_address, number, protocol)]
                    reach.append(
                        PortReach(self._name(source), self._name(target_address), name, number, protocol, state)
                    )
                    if name == RANKS and state == OPEN:
                        passing.add((source, target_address))
        return reach, passing

    def _links(
        self,
        participants: Sequence[Participant],
        opened: Mapping[str, Opened],
        passing: set[tuple[str, str]],
        in_full: bool,
    ) -> list[LinkFacts]:
        """No machine takes part in two measurements at once. in_full: more than the round trip."""
        rounds = pair_rounds([one.address for one in participants if one.address in opened])
        seconds = 0.0
        if in_full:
            share = _LINKS_SECONDS / max(2 * len(rounds), 1) / 2.5
            seconds = min(max(share, _SHORTEST_LINK_SECONDS), _LONGEST_LINK_SECONDS)
        by_address = {one.address: one for one in participants}
        links: list[LinkFacts] = []
        for pairs in rounds:
            for ways in (pairs, [(second, first) for first, second in pairs]):
                target_of = {source: target for source, target in ways if (source, target) in passing}

                def measure(one: Participant, target_of: Mapping[str, str] = target_of) -> LinkFacts:
                    target = target_of[one.address]
                    return one.measure(target, opened[target], seconds)

                links += self._each([by_address[source] for source in target_of], measure).values()
        slow = outliers(links)
        for link in slow if len(slow) <= _MOST_REPEATED else []:
            target = link.target

            def repeat(one: Participant, target: str = target) -> LinkFacts:
                return one.measure(target, opened[target], seconds)

            for again in self._each([by_address[link.source]], repeat).values():
                if again.bandwidth_bytes_per_s > link.bandwidth_bytes_per_s:
                    links[links.index(link)] = again
        return links

    def _collectives(self, participants: Sequence[Participant], opened: Mapping[str, Opened]) -> list[CollectiveFacts]:
        taking = [one for one in participants if one.address in opened]
        names = [self._name(one.address) for one in taking]
        facts = {one.address: self._nodes[one.address] for one in taking}
        if lacking := [node.name for node in facts.values() if node.versions.torch.state != "ok"]:
            return [
                CollectiveFacts(
                    "gloo", "skipped", names, f"torch does not work, or is not there, on {', '.join(lacking)}"
                )
            ]
        if not taking:
            return []
        # On one machine two ranks make a group; on several, one each shows all ways.
        counts = {one.address: 2 if len(taking) == 1 else 1 for one in taking}
        found = [self._try("gloo", taking, counts, opened, None, names)]
        gpus = {address: _num_gpus(node) for address, node in facts.items()}
        if not all(gpus.values()):
            found.append(CollectiveFacts("nccl", "skipped", names, "not every machine has GPUs that torch can use"))
        elif sum(gpus.values()) < 2:
            found.append(CollectiveFacts("nccl", "skipped", names, "there is one GPU: nothing to reduce with"))
        elif found[0].state != "ok":
            found.append(CollectiveFacts("nccl", "skipped", names, "NCCL meets as Gloo does, and that failed"))
        else:
            several = len(taking) > 1
            has_rdma = several and all(node.network.rdma_devices for node in facts.values())
            choices: tuple[bool | None, ...] = (True, False) if has_rdma else (None,)
            found += [self._try("nccl", taking, gpus, opened, use_rdma, names) for use_rdma in choices]
        return found

    def _try(
        self,
        backend: str,
        participants: Sequence[Participant],
        counts: Mapping[str, int],
        opened: Mapping[str, Opened],
        use_rdma: bool | None,
        names: list[str],
    ) -> CollectiveFacts:
        first = participants[0].address
        places = [(one.address, number) for one in participants for number in range(counts[one.address])]
        called = [f"rank {rank} (on {self._name(address)})" for rank, (address, _) in enumerate(places)]
        ranks = {
            one.address: [
                TrialOrder(
                    backend,
                    rank,
                    address,
                    first,
                    opened[first].spare_port,
                    called,
                    _TRIAL_BYTES,
                    _TRIAL_SECONDS,
                    number,
                )
                for rank, (address, number) in enumerate(places)
                if address == one.address
            ]
            for one in participants
        }
        outcomes = self._each(participants, lambda one: one.run_ranks(ranks[one.address], use_rdma, 6 * _TRIAL_SECONDS))
        return summarize(
            backend, outcomes, names, len(places), {one.address: self._name(one.address) for one in participants}
        )


def summarize(
    backend: str, outcomes: Mapping[str, Sequence[Outcome]], names: list[str], num_ranks: int, called: Mapping[str, str]
) -> CollectiveFacts:
    """One word about all ranks: what the first of them that failed says, if any did."""
    every = [outcome for each in outcomes.values() for outcome in each]
    transport = next((outcome.network for outcome in every if outcome.network), "")
    if skipped := next((outcome.skipped for outcome in every if outcome.skipped), ""):
        return CollectiveFacts(backend, "skipped", names, skipped, num_ranks)
    if gone := [name for address, name in called.items() if address not in outcomes]:
        reason = f"no word from {', '.join(gone)}"
        return CollectiveFacts(backend, "failed", names, reason, num_ranks, transport=transport)
    errors = [f"{called[address]}: {o.error}" for address, each in outcomes.items() for o in each if o.error]
    # All ranks say the same, once one told them.
    if errors:
        return CollectiveFacts(backend, "failed", names, errors[0], num_ranks, transport=transport)
    return CollectiveFacts(
        backend, "ok", names, "", num_ranks, every[0].num_bytes, max(outcome.seconds for outcome in every), transport
    )


def pair_rounds(members: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Every pair once, in rounds in which nobody is twice: the circle method for round-robin tournaments."""
    circle: list[str | None] = [*members]
    if len(circle) % 2:
        circle.append(None)
    rounds = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(first, second) for first, second in pairs if first is not None and second is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def _is_astray(node: NodeFacts) -> bool:
    """Whether the head did not answer at the address that this machine would use."""
    ways = {way.address: way.state for way in node.network.ways}
    return ways.get(node.address, OPEN) not in (OPEN, REFUSED)


def _num_gpus(node: NodeFacts) -> int:
    torch = node.versions.torch
    return torch.num_devices if torch.state == "ok" and torch.cuda_usable else 0
