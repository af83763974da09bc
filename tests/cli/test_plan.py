"""`shoal plan` as it is typed."""

from __future__ import annotations

import json

import pytest

from shoal.cli.main import main
from tests.cluster.plan.models import path_of


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_example_of_70b_on_two_machines(capsys):
    code, out, err = run(capsys, path_of("Llama-3.1-70B"), "--gpus", "2x4xL20-46GiB", "--node-link", "10gbe")
    assert (code, err) == (0, "")
    assert "141,107,412,992 bytes" in out and "42,949,672,960 bytes" in out
    assert "KV cache of 32 × 4096 tokens" in out
    assert "2 nodes of 4 × L20, 44.7 GiB each, PCIe inside, 10gbe between them" in out
    assert "Choice: TP 4 × PP 1 × DP 2" in out and "shoal serve" in out and "shoal router" in out


def test_json_has_exact_integers(capsys):
    code, out, _ = run(capsys, path_of("Llama-3.1-70B"), "--gpus", "8xH100-80", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["weights"]["total_bytes"] == 141107412992
    assert report["kv_cache"]["load_bytes"] == 42949672960
    assert report["choice"]["tensor_parallel_size"] == 8
    assert report["choice"]["commands"] == [
        f"shoal serve {path_of('Llama-3.1-70B')} --tensor-parallel-size 8 --max-model-len 4096"
    ]


def test_several_nodes_get_the_commands_of_a_cluster(capsys):
    code, out, _ = run(capsys, path_of("Llama-3.1-405B"), "--gpus", "2x8xH100-80", "--node-link", "100gbe", "--json")
    commands = json.loads(out)["choice"]["commands"]
    assert code == 0 and commands[0].startswith("shoal node start --head")
    assert "--tensor-parallel-size 8 --pipeline-parallel-size 2 --distributed-executor-backend ray" in commands[2]


def test_nothing_fits(capsys):
    code, out, err = run(capsys, path_of("Llama-3.1-405B"), "--gpus", "8xH100-80")
    assert code == 1
    assert "811,706," in out.replace("\n", "")
    assert "shoal: error: nothing fits" in err and "8 × H200 (114 such requests)" in err
    code, out, err = run(capsys, path_of("Llama-3.1-405B"), "--gpus", "8xH100-80", "--json")
    assert code == 1 and json.loads(out)["refusal"]["smallest_machines"][0]["devices_per_node"] == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "8xH101"], "did you mean H100"),
        (["--gpus", "1000x8xH100-80"], "up to 256 nodes with 2048 GPUs in all"),
        (["--gpus", "4096xH100-80"], "up to 256 nodes with 2048 GPUs in all"),
        (["--gpus", "257xcpu-16c-32GB"], "up to 256 nodes"),
        (["--gpus", "3xcpu-16c"], "a CPU is given by its cores and memory, such as 3xcpu-16c-32GB"),
        (["--gpus=-1xH100-80"], "nodes and GPUs are counted from 1"),
        (["--gpus", "nonsense nonsense"], "is not known"),
        (["--gpus", "8xH100", "--cluster"], "give one of them"),
        (["--gpus", "2x8xH100", "--node-link", "string"], "'string' is not known; known: 1gbe"),
        (["--concurrency", "0"], "--concurrency must be an integer, 1 or more"),
        (["--quantization", "gguf"], "--quantization must be one of gptq"),
        (["--prefer", "latencey"], "did you mean latency"),
        (["--max-model-len", "999999"], "longer than the model's own limit"),
        (["--gpu", "8xH100"], "did you mean --gpus"),
    ],
)
def test_wrong_input_is_explained(arguments, words, capsys):
    code, out, err = run(capsys, path_of("Llama-3.1-8B"), *arguments)
    assert code == 2 and out == "" and words in err and err.count("\n") == 1


def test_a_model_that_is_not_there(capsys):
    code, _, err = run(capsys, "/no/such/model", "--gpus", "1xH100")
    assert code == 1 and "does not exist" in err


def test_this_machine_is_planned_for_without_a_word(capsys):
    code, out, _ = run(capsys, "shoal-tiny", "--concurrency", "1")
    assert code == 0 and "shoal serve shoal-tiny" in out
