"""One model on several hosts without Ray: the same `shoal serve` on each, and the tokens of a single process.

The hosts' own names resolve to their loopback, and no variable names an interface.
"""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.multihost.served import PROMPTS, cluster, complete, tokens_of_one_process
from tests.namespaces import needs_namespaces

pytestmark = needs_namespaces

_OPTIONS = ("--max-model-len", "512", "--max-num-seqs", "8", "--startup-timeout", "60")
_NUM_TOKENS = 24


@pytest.fixture(scope="module")
def expected():
    return tokens_of_one_process(PROMPTS, _NUM_TOKENS, max_model_len=512)


def answers(cluster):
    with cluster.client() as client:
        return [complete(client, prompt, _NUM_TOKENS)[0] for prompt in PROMPTS]


def test_two_hosts_with_two_ranks_each_and_the_loss_of_one(tmp_path, expected):
    with cluster(2, tmp_path, "-tp", "2", "-pp", "2", *_OPTIONS) as two:
        two.start_all()
        two.until_up()
        assert answers(two) == expected
        os.kill(two.servers[1].worker(), signal.SIGKILL)
        assert two.until_all_ended(10) == [1, 1]
        for server in two.servers.values():
            assert "node2" in server.output and "was killed by signal 9" in server.output


def test_a_node_that_never_comes(tmp_path):
    with cluster(2, tmp_path, "-tp", "2", "--startup-timeout", "4") as two:
        node_0 = two.start(0)
        assert node_0.exit_code(30) == 1
        two.hosts[0].wait_until_empty(5)
        assert "start-up phase 'spawn'" in node_0.output and "did not come within 4 s" in node_0.output
        assert f"rank 1 (on node 1, which has not come to {two.hosts[0].address}:29500" in node_0.output
        assert re.search(rf"the others: rank 0 \(node1 {two.hosts[0].address} on eth0, pid", node_0.output)


@pytest.mark.slow
def test_two_hosts_with_one_rank_each_end_in_order(tmp_path, expected):
    with cluster(2, tmp_path, "-tp", "2", *_OPTIONS) as two:
        two.start_all()
        two.until_up()
        assert answers(two) == expected
        two.servers[0].process.send_signal(signal.SIGTERM)
        assert two.until_all_ended(15) == [0, 0]


@pytest.mark.slow
def test_three_hosts_with_a_stage_each(tmp_path, expected):
    with cluster(3, tmp_path, "-pp", "3", *_OPTIONS) as three:
        three.start_all()
        three.until_up()
        assert answers(three) == expected
        three.servers[0].process.send_signal(signal.SIGINT)
        assert three.until_all_ended(15) == [0, 0, 0]


@pytest.mark.slow
def test_replicas_on_two_hosts(tmp_path, expected):
    """Each of the two replicas has a host of its own; the core of the second drives a worker on the other machine."""
    with cluster(2, tmp_path, "-dp", "2", *_OPTIONS) as two:
        two.start_all()
        two.until_up()
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(lambda _: answers(two), range(2))) == [expected] * 2
        two.servers[0].process.send_signal(signal.SIGTERM)
        assert two.until_all_ended(15) == [0, 0]
