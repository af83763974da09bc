"""One model on several hosts with Ray: `shoal node start` on each, `shoal serve` on the head, one process's tokens.

The hosts' own names resolve to their loopback, and no variable names an interface.
"""

from __future__ import annotations

import signal

import pytest

from tests.executor.engines import wait_until
from tests.multihost.ray_hosts import environment_of, ray_cluster
from tests.multihost.served import PROMPTS, complete, tokens_of_one_process
from tests.namespaces import needs_namespaces

pytestmark = needs_namespaces

_OPTIONS = (
    "--max-model-len",
    "4096",
    "--max-num-seqs",
    "8",
    "--startup-timeout",
    "60",
    "--num-gpu-blocks-override",
    "512",
)
_NUM_TOKENS = 24
_HIDDEN_BYTES = 256 * 4  # shoal-tiny, float32
_LONG_PROMPT = 3000


@pytest.fixture(scope="module")
def expected():
    return tokens_of_one_process(PROMPTS, _NUM_TOKENS, max_model_len=512)


def answers(cluster):
    with cluster.client() as client:
        return [complete(client, prompt, _NUM_TOKENS)[0] for prompt in PROMPTS]


def bytes_per_token(cluster):
    """From the first host to the second, for a prompt of which nothing is cached."""
    before = cluster.hosts[0].bytes_sent()
    with cluster.client() as client:
        complete(client, [[5 + number % 90 for number in range(_LONG_PROMPT)]], 1)
    return (cluster.hosts[0].bytes_sent() - before) / _LONG_PROMPT


def end(cluster, server):
    server.process.send_signal(signal.SIGTERM)
    assert server.exit_code(20) == 0
    wait_until(lambda: not cluster.left(), 10)


def test_two_hosts_with_two_ranks_each(tmp_path, expected):
    # The second machine has its own mind about one of the variables.
    with ray_cluster(2, tmp_path, num_cpus=2, variables={1: {"NCCL_DEBUG": "VERSION"}}) as two:
        secret = {"HF_TOKEN": "hush", "SHOAL_API_KEY": ""}
        server = two.serve("-tp", "2", "-pp", "2", *_OPTIONS, NCCL_DEBUG="WARN", NCCL_IB_DISABLE="1", **secret)
        two.until_up()
        assert answers(two) == expected
        assert [len(two.workers(host)) for host in two.hosts] == [2, 2]
        for host, debug in zip(two.hosts, ("WARN", "VERSION"), strict=True):
            for pid in two.workers(host):
                environment = environment_of(pid)
                assert (environment["NCCL_DEBUG"], environment["NCCL_IB_DISABLE"]) == (debug, "1")
                assert not [name for name in environment if name.startswith("RAY_") or name == "HF_TOKEN"]
        # Between two stages a token costs its hidden state, over the wire and all told.
        assert bytes_per_token(two) <= 1.1 * _HIDDEN_BYTES
        end(two, server)
        assert "ray" not in server.output.lower().replace("--distributed-executor-backend ray", ""), server.output
