"""One model on several hosts without Ray: the same `shoal serve` on each, and the tokens of a single process.

The hosts' own names resolve to their loopback, and no variable names an interface.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.multihost.served import PROMPTS, TOKEN, cluster, complete, tokens_of_one_process
from tests.namespaces import connected_hosts, needs_namespaces

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
        assert "[W" not in two.outputs(), "torch warns of hosts that no name server knows"
        os.kill(two.servers[1].worker(), signal.SIGKILL)
        assert two.until_all_ended(10) == [1, 1]
        for server in two.servers.values():
            assert "node2" in server.output and "was killed by signal 9" in server.output


def test_a_node_that_never_comes(tmp_path):
    with cluster(2, tmp_path, "-tp", "4", "--startup-timeout", "4") as two:
        node_0 = two.start(0)
        assert node_0.exit_code(30) == 1
        two.hosts[0].wait_until_empty(5)
        assert "start-up phase 'spawn'" in node_0.output and "did not come within 4 s" in node_0.output
        assert f"rank 2, 3 (on node 1, which has not come to {two.hosts[0].address}:29500" in node_0.output
        assert re.search(rf"the others: rank 0 \(node1 {two.hosts[0].address} on eth0, pid", node_0.output)


def test_ctrl_c_on_node_0_during_the_start_ends_all_nodes_in_order(tmp_path):
    with cluster(2, tmp_path, "-tp", "4", *_OPTIONS) as two:
        two.start_all()
        two.servers[1].until("starting rank 2, 3")
        two.servers[0].process.send_signal(signal.SIGINT)
        assert two.until_all_ended(15) == [0, 0]
        assert "stopped while starting" in two.servers[0].output
        assert two.servers[1].output.endswith("the engine has ended\n")


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


_SCRIPT = """
import sys
from shoal import LLM, SamplingParams

options = {"nnodes": 2, "node_rank": int(sys.argv[1]), "master_addr": sys.argv[2], "startup_timeout": 60}
with LLM(device="cpu", max_model_len=512, tensor_parallel_size=2, **options) as llm:
    parameters = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True)
    print([output.outputs[0].token_ids for output in llm.generate(sys.argv[4:], parameters, use_tqdm=False)])
"""


@pytest.mark.slow
def test_the_same_script_on_both_hosts(tmp_path, expected):
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    with connected_hosts(2) as network, ThreadPoolExecutor(2) as pool:
        nodes = enumerate(network.hosts)
        arguments = (network.hosts[0].address, str(_NUM_TOKENS), *PROMPTS)
        environment = {"SHOAL_CLUSTER_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
        runs = [
            pool.submit(host.run, sys.executable, str(script), str(rank), *arguments, env=environment)
            for rank, host in nodes
        ]
        outputs = [run.result() for run in runs]
        assert ast.literal_eval(outputs[0]) == expected
        assert outputs[1] == ""  # what follows LLM(…) is node 0's
        for host in network.hosts:
            host.wait_until_empty(5)


@pytest.mark.slow
@pytest.mark.parametrize("tensor_size", [1, 2])
def test_little_more_than_the_hidden_states_cross_the_network(tmp_path, tensor_size, capsys):
    """Two stages on two hosts; all that the hosts send is counted, in both directions: hidden states and sampled tokens
    between the stages, steps from the core and results back, signs of life, and the headers of Ethernet, IP and TCP.

    Steps are worth some hundred bytes, whatever the batch, so one request alone is only printed: 1.3 × a hidden state
    of 4 KiB, that is.
    """
    hidden_size, batch, num_steps = 1024, 32, 48
    model = make_checkpoint(
        tmp_path / "model", "qwen2", hidden_size=hidden_size, intermediate_size=1024, num_attention_heads=8
    )
    degrees = ("-tp", str(tensor_size), "-pp", "2", "--max-num-seqs", str(batch), "--max-model-len", "256")
    with cluster(2, tmp_path, "{home}/model", *degrees) as two:
        for host in two.hosts:  # each has it at another path
            shutil.copytree(model, host.home / "model")
        two.start_all()
        two.until_up()
        with two.client() as client:
            complete(client, [[7, 8, 9]], 4)  # the first step sets connections up
            command = Path(f"/proc/{two.servers[1].worker()}/cmdline").read_text()
            assert str(two.hosts[1].home) in command and str(two.hosts[0].home) not in command
            hidden = 4 * hidden_size  # fp32
            ratios = {}
            for size in (1, batch):
                prompts = [[10 + index, 6, 7, 8] for index in range(size)]
                before = [host.bytes_sent() for host in two.hosts]
                complete(client, prompts, num_steps)
                sent = [host.bytes_sent() - then for host, then in zip(two.hosts, before, strict=True)]
                num_tokens = size * (4 + num_steps - 1)  # the last token that is sampled goes through no stage
                ratios[size] = sum(sent) / num_tokens / hidden
                with capsys.disabled():
                    print(
                        f"\nTP={tensor_size} x PP=2, {size} at once: {sent[0] / num_tokens:.0f} bytes a token up, "
                        f"{sent[1] / num_tokens:.0f} back, {ratios[size]:.3f} x the hidden state of {hidden}"
                    )
    assert 1.0 < ratios[batch] < 1.1
