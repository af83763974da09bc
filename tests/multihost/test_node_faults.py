"""What several hosts say, and that nothing is left on any of them, when one of them or the link between them fails."""

from __future__ import annotations

import os
import re
import signal

import openai
import pytest

from tests.multihost.served import cluster, complete
from tests.namespaces import needs_namespaces

pytestmark = [needs_namespaces, pytest.mark.slow]

_OPTIONS = ("-tp", "2", "--max-model-len", "512", "--max-num-seqs", "8", "--startup-timeout", "60")
# A cut link shows by silence, of 8 seconds; all else at once. Then all processes are gone within 5.
_SILENCE_SECONDS = 8
_ENDING_SECONDS = 5


@pytest.fixture
def two(tmp_path, request):
    options = getattr(request, "param", ())
    with cluster(2, tmp_path, *_OPTIONS, *options) as two:
        two.start_all()
        yield two


def test_the_link_is_cut_during_the_start(two):
    two.servers[1].until("starting rank 1")
    two.network.cut(two.hosts[1])
    assert two.until_all_ended(_SILENCE_SECONDS + _ENDING_SECONDS) == [1, 1]
    assert re.search(
        rf"rank 1 \(.*node2 {two.hosts[1].address}, pid \d+\) is lost with node 1: nothing was heard of it for 8 s",
        two.servers[0].output,
    )
    assert f"nothing was heard of node 0 at {two.hosts[0].address}:29500 for 8 s" in two.servers[1].output


@pytest.mark.parametrize("silent", [True, False])
def test_the_link_is_cut_while_a_request_is_served(two, silent):
    two.until_up()
    with two.client() as client:
        stream = client.completions.create(
            model="shoal-tiny", prompt="a", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        for _ in range(3):
            next(chunks)
        two.network.cut(two.hosts[1], silent=silent)
        with pytest.raises(openai.APIError, match="node 1"):
            list(chunks)
    assert two.until_all_ended(_SILENCE_SECONDS + _ENDING_SECONDS) == [1, 1]
    assert "the machine is down or cut off" in two.servers[0].output
    assert "it is down or cut off" in two.servers[1].output


def test_an_agent_is_killed(two):
    two.until_up()
    two.servers[1].process.kill()
    assert two.until_all_ended(_ENDING_SECONDS) == [1, -9]
    assert "is gone with node 1: " in two.servers[0].output


def test_an_agent_is_told_to_end(two):
    two.until_up()
    two.servers[1].process.send_signal(signal.SIGTERM)
    assert two.until_all_ended(_ENDING_SECONDS) == [1, 0]
    assert "because node 1 left: " in two.servers[0].output and "by SIGTERM" in two.servers[0].output


def test_the_core_is_killed(two):
    two.until_up()
    os.kill(two.servers[0].core(), signal.SIGKILL)
    assert two.until_all_ended(_ENDING_SECONDS) == [1, 1]
    assert "was killed by signal 9" in two.servers[0].output
    assert f"the connection to node 0 at {two.hosts[0].address}:29500 was closed" in two.servers[1].output


def test_node_0_loses_its_power(two):
    two.until_up()
    two.network.cut(two.hosts[0])
    two.hosts[0].kill_all()
    assert two.servers[1].exit_code(_SILENCE_SECONDS + _ENDING_SECONDS) == 1
    two.hosts[1].wait_until_empty(1)


@pytest.mark.parametrize("two", [("--step-timeout", "4")], indirect=True)
def test_a_rank_of_another_host_is_stopped(two):
    two.until_up()
    worker = two.servers[1].worker()
    os.kill(worker, signal.SIGSTOP)
    with two.client() as client, pytest.raises(openai.APIError):
        complete(client, "a", 50)
    assert two.until_all_ended(10 + _ENDING_SECONDS) == [1, 1]
    stopped = rf"nothing was heard of rank 1 \(node2 {two.hosts[1].address}, pid {worker}\) for \d+ s: it is stopped"
    assert re.search(stopped, two.servers[0].output)
