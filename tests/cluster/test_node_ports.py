"""The table of ports, and probing: each kind of no is told from the others."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster import reach
from shoal.cluster.ports import NodePorts, needed_between_nodes
from shoal.errors import ConfigError, StartupError
from tests.namespaces import connected_hosts

_DOCUMENT = Path(__file__).parents[2] / "docs" / "ports.md"


@given(st.integers(-10, 70000))
def test_ports_of_a_node_never_collide(head):
    try:
        ports = NodePorts(head)
    except ConfigError:
        assert head < 1 or head > 65528 or 9995 <= head <= 10999 or 8258 <= head <= 8265
        return
    taken = set()
    for port in ports.table():
        numbers = {(port.protocol, number) for number in range(port.first, port.last + 1)}
        assert not numbers & taken
        taken |= numbers
    assert all(0 < number < 65536 for _, number in taken)


def test_the_document_shows_the_table():
    text = _DOCUMENT.read_text()
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in text.splitlines() if line.startswith("|")}
    for port in NodePorts().table():
        assert (port.number.replace("-", "–"), port.protocol.upper()) in {
            (re.sub(r"[`*]", "", number), protocol) for number, protocol in rows
        }, port


def test_what_is_needed_between_nodes():
    names = {port.name for port in needed_between_nodes(NodePorts(), is_head=True)}
    assert names == {"head", "daemon", "beats", "node manager", "object manager", "workers"}
    assert {port.name for port in needed_between_nodes(NodePorts(), is_head=False)} == names - {"head"}


def test_probes_tell_open_refused_dropped_and_unreachable():
    with connected_hosts(2) as hosts:
        here, there = hosts.hosts
        with there.entered():
            listener = socket.create_server(("", 7001))
        with here.entered(), listener:
            assert reach.probe(there.address, 7001) == reach.OPEN
            assert reach.probe(there.address, 7002) == reach.REFUSED
            assert reach.probe("192.0.2.1", 7001) == reach.UNREACHABLE
            hosts.cut(there)
            assert reach.probe(there.address, 7001, timeout=0.5) == reach.DROPPED


def test_many_ports_are_tried_at_once():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert reach.probe_all([("127.0.0.1", port), ("127.0.0.1", port)]) == {("127.0.0.1", port): reach.OPEN}
    assert reach.probe_all([]) == {}


def test_a_range_that_is_closed_as_a_whole_is_named_as_one():
    table = {port.name: port for port in NodePorts().table()}
    workers, daemon = table["workers"], table["daemon"]
    states = [(workers, number, reach.DROPPED) for number in reach.sample(workers)]
    assert reach.describe([(daemon, 6380, reach.OPEN), *states], "A") == (
        "of A: 10002-10999/tcp (dropped: Ray's workers: actors of engines and deployments, tasks)"
    )
    states[0] = (workers, 10002, reach.OPEN)
    assert reach.describe(states, "A").count("/tcp (dropped") == 2
    assert reach.describe([(daemon, 6380, reach.OPEN)], "A") == ""


def test_a_taken_port_of_the_node_is_named():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        head = listener.getsockname()[1] - 2
        with pytest.raises(
            StartupError, match=r"it is this node's for .* \(docs/ports.md\): end what holds it, or choose"
        ):
            reach.refuse_taken(NodePorts(head), "127.0.0.1", is_head=False, dashboard=False)
