"""One model on several hosts with Ray: `shoal node start` on each, `shoal serve` on the head, one process's tokens.

The hosts' own names resolve to their loopback, and no variable names an interface.
"""

from __future__ import annotations

import ast
import os
import re
import signal

import pytest

from tests.executor.engines import wait_until
from tests.multihost.ray_hosts import environment_of, ray_cluster
from tests.multihost.served import PROMPTS, client_on, complete, tokens_of_one_process
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
    with client_on(cluster.hosts[0]) as client:
        return [complete(client, prompt, _NUM_TOKENS)[0] for prompt in PROMPTS]


def bytes_per_token(cluster):
    """From the first host to the second, for a prompt of which nothing is cached."""
    before = cluster.hosts[0].bytes_sent()
    with client_on(cluster.hosts[0]) as client:
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
        server.until("is served at")
        assert answers(two) == expected
        assert [len(two.workers(host)) for host in two.hosts] == [2, 2]
        for host, debug in zip(two.hosts, ("WARN", "VERSION"), strict=True):
            for pid in two.workers(host):
                environment = environment_of(pid)
                assert (environment["NCCL_DEBUG"], environment["NCCL_IB_DISABLE"]) == (debug, "1")
                assert not [
                    name
                    for name in environment
                    if name.startswith("RAY_") or name in ("HF_TOKEN", "SHOAL_CLUSTER_TOKEN")
                ]
        # Between two stages a token costs its hidden state, over the wire and all told.
        assert bytes_per_token(two) <= 1.1 * _HIDDEN_BYTES
        end(two, server)
        assert "ray" not in server.output.lower().replace("--distributed-executor-backend ray", ""), server.output


@pytest.mark.slow
@pytest.mark.parametrize(("num_hosts", "tensor", "pipeline"), [(2, 2, 1), (3, 1, 3)])
def test_one_rank_a_host(tmp_path, expected, num_hosts, tensor, pipeline):
    with ray_cluster(num_hosts, tmp_path, num_cpus=1) as hosts:
        server = hosts.serve("-tp", str(tensor), "-pp", str(pipeline), *_OPTIONS)
        server.until("is served at")
        assert answers(hosts) == expected
        assert [len(hosts.workers(host)) for host in hosts.hosts] == [1] * num_hosts
        end(hosts, server)


@pytest.mark.slow
def test_what_ends_an_engine_is_told_and_nothing_is_left(tmp_path):
    with ray_cluster(2, tmp_path, num_cpus=2) as two:
        here, there = two.hosts
        # A worker of the other machine.
        server = two.serve("-tp", "2", "-pp", "2", *_OPTIONS)
        server.until("is served at")
        os.kill(two.workers(there)[0], signal.SIGKILL)
        assert server.exit_code(20) == 1
        assert re.search(rf"rank [23] \(node2 {there.address}, pid \d+\) was killed by signal 9", server.output)
        wait_until(lambda: not two.left(), 10)
        # Its actor.
        server = two.serve("-tp", "2", "-pp", "2", *_OPTIONS)
        server.until("is served at")
        os.kill(two.processes(there, "ray::WorkerActor")[0], signal.SIGKILL)
        assert server.exit_code(20) == 1
        assert re.search(rf"rank [23] \(node2 {there.address}, pid \d+\) died with its Ray actor", server.output)
        wait_until(lambda: not two.left(), 10)
        # The engine core.
        server = two.serve("-tp", "2", "-pp", "2", *_OPTIONS)
        server.until("is served at")
        os.kill(server.core(), signal.SIGKILL)
        assert server.exit_code(20) == 1
        wait_until(lambda: not two.left(), 15)
        # Ctrl-C while it comes up.
        server = two.serve("-tp", "2", "-pp", "2", *_OPTIONS)
        wait_until(lambda: two.processes(there, "ray::WorkerActor"), 60)
        server.process.send_signal(signal.SIGINT)
        server.exit_code(20)
        wait_until(lambda: not two.left(), 15)
        # The other machine is cut off.
        server = two.serve("-tp", "2", "-pp", "2", *_OPTIONS)
        server.until("is served at")
        two.network.cut(there)
        assert server.exit_code(40) == 1
        assert "node2" in server.output
        wait_until(lambda: not [pid for pid in two.left() if pid in here.pids()], 15)
        wait_until(lambda: not two.left(), 60)
        two.network.heal(there)


_OFFLINE = """
import sys
from shoal import LLM, SamplingParams
# Ray's own way: no main guard, nothing that is imported again.
llm = LLM(model="shoal-tiny", tensor_parallel_size=2, pipeline_parallel_size=2, distributed_executor_backend="ray",
          max_model_len=512, num_gpu_blocks_override=64)
outputs = llm.generate(sys.argv[1:], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
print([list(output.outputs[0].token_ids) for output in outputs])
"""


@pytest.mark.slow
def test_offline(tmp_path, expected):
    with ray_cluster(2, tmp_path, num_cpus=2) as two:
        printed = two.hosts[0].python(_OFFLINE, *PROMPTS, timeout=120)
        assert ast.literal_eval(printed.splitlines()[-1]) == expected
        wait_until(lambda: not two.left(), 10)
