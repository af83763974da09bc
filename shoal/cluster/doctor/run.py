"""`shoal doctor` from its question to its facts: who takes part, and what is seen where a cluster cannot be asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import msgspec

from shoal import env, network
from shoal.cluster.doctor.facts import ClusterFacts, CollectiveFacts, NodeFacts, PortReach
from shoal.cluster.doctor.participants import Here, Participant, There
from shoal.cluster.doctor.services import GatherRequest, probe_targets
from shoal.cluster.doctor.survey import Steps, Survey
from shoal.cluster.ports import NodePorts, needed_between_nodes
from shoal.cluster.reach import sample
from shoal.cluster.verify.nodes import Nodes, find_nodes
from shoal.errors import ConfigError, NodeError, ShoalError
from shoal.network.node_record import NodeRecord, read_record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """model: to look for on every machine. address: HOST:PORT of a head. is_wide: look at all nodes of the cluster.

    port: of a head that this machine would be. say: is told what is done now.
    """

    model: str | None = None
    address: str | None = None
    is_wide: bool = False
    steps: Steps = Steps()
    token_file: str | None = None
    port: int
    say: Callable[[str], None] = lambda _: None


def look(question: Question) -> ClusterFacts:
    """The facts; this machine's own come first. Raises ConfigError where the question cannot be put."""
    record = read_record()
    if not question.is_wide and question.address is None:
        return _look_here(question, record)
    head = question.address or env.ray_address() or (record.head if record else None)
    if head is None or head == "auto":
        raise ConfigError(
            "which cluster? No node runs on this machine: `shoal doctor --address HEAD:PORT` looks at one that it is "
            "no part of, and `shoal doctor` at this machine alone"
        )
    host, port = network.split_endpoint(head, question.port)
    head = network.format_endpoint(host, port)
    ports = NodePorts(head=port)
    member = record if record is not None and record.head == head else None
    try:
        token = network.load_token(question.token_file)
        here = _here(head, member, ports, token)
        question.say(f"asking the cluster of {head} for its nodes")
        nodes = find_nodes(head, token)
    except (NodeError, ConfigError) as error:
        here = _here(head, member, ports, "")
        return _look_without(question, here, head, ports, str(error))
    return _look_wide(question, here, head, ports, token, nodes)


def _here(head: str | None, member: NodeRecord | None, ports: NodePorts, token: str) -> Here:
    return Here(
        head=head,
        address=member.address if member else None,
        is_head=member.is_head if member else False,
        is_node=member is not None,
        ports=ports,
        token=token,
    )


def _look_here(question: Question, record: NodeRecord | None) -> ClusterFacts:
    """This machine alone: also what two of its processes can do together."""
    port = network.split_endpoint(record.head)[1] if record else question.port
    head = record.head if record else None
    here = _here(head, record, NodePorts(head=port), "")
    survey = Survey([here], NodePorts(head=port), question.say)
    return survey.run(model=question.model, steps=question.steps)


def _look_wide(question: Question, here: Here, head: str, ports: NodePorts, token: str, nodes: Nodes) -> ClusterFacts:
    participants: list[Participant] = [here]
    host = network.resolve_head(network.split_endpoint(head)[0])
    # Those whose heartbeats are not heard are asked too: that may be all that is wrong with them.
    absent = {address: network.format_endpoint(address, ports.daemon) for address in nodes.absent}
    participants += [
        There(address, endpoint, token, is_head=address == host)
        for address, endpoint in {**nodes.endpoints, **absent}.items()
        if address != here.address
    ]
    survey = Survey(participants, ports, question.say)
    facts = survey.run(model=question.model, steps=question.steps)
    # Of those that said nothing, what can be seen from here.
    silent = [one for one in participants[1:] if one.address in facts.silent]
    reach = [each for one in silent for each in _try_ports(here, facts.nodes[0].name, one.address, ports, one.is_head)]
    return msgspec.structs.replace(facts, reach=[*facts.reach, *reach])


def _look_without(question: Question, here: Here, head: str, ports: NodePorts, reason: str) -> ClusterFacts:
    """The head's daemon says nothing: what can be seen of the head from here, by its ports."""
    question.say(f"the cluster cannot be asked ({reason}); trying the head's ports")
    node: NodeFacts = here.gather(GatherRequest(question.model, question.steps.torch, question.steps.gpus))
    try:
        address = network.resolve_head(network.split_endpoint(head)[0])
    except ShoalError as error:
        return ClusterFacts(nodes=[node], silent={head: str(error)})
    reach = _try_ports(here, node.name, address, ports, is_head=True)
    skipped = CollectiveFacts("gloo", "skipped", [node.name], "the cluster's nodes cannot be asked")
    return ClusterFacts(nodes=[node], silent={head: reason}, reach=reach, collectives=[skipped])


def _try_ports(here: Here, name: str, address: str, ports: NodePorts, is_head: bool) -> list[PortReach]:
    """The TCP ports of a node at `address`, from this machine, which calls itself `name`."""
    listed = [
        (port.name, number)
        for port in needed_between_nodes(ports, is_head=is_head)
        for number in sample(port)
        if port.protocol == "tcp"
    ]
    states = probe_targets([(address, number, "tcp") for _, number in listed], here.address, "")
    return [
        # Of the workers' range nothing need listen, so a refusal is well there.
        PortReach(name, address, port, number, "tcp", state, is_held=port != "workers")
        for (port, number), state in zip(listed, states, strict=True)
    ]
