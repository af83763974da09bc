"""The images' entry point, with a `shoal` that writes down how it was called."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.cli.client_options import NodeStartOptions
from shoal.cluster.overview import NodeStatus, Overview
from shoal.config.options import EMBEDDED_MODEL
from shoal.config.sources import SERVE_SECTIONS, options_from_arguments
from tests.deploy.programs import ROOT, Programs

ENTRYPOINT = ROOT / "deploy" / "docker" / "entrypoint.sh"
SHOAL = """
if sys.argv[1:2] == ["status"]:
    print(open(os.environ["STATUS"]).read())
elif sys.argv[1:2] == ["serve"]:
    if "SERVES" in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), log_end(), sys.exit(7)))
        def log_end():
            with open(os.environ["SERVES"], "a") as file:
                file.write("drained\\n")
        with open(os.environ["SERVES"], "w") as file:
            file.write("serves\\n")
        while True:
            time.sleep(0.05)
    sys.exit(int(os.environ.get("SERVE_CODE", "0")))
elif sys.argv[1:3] == ["node", "start"] and "NODE_CODE" in os.environ:
    sys.exit(int(os.environ["NODE_CODE"]))
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    made = Programs(tmp_path)
    made.add("shoal", SHOAL)
    return made


def environment(programs: Programs, **variables: str) -> dict[str, str]:
    return {"PATH": f"{programs.directory}:{os.environ['PATH']}", "HOME": str(programs.directory.parent), **variables}


@pytest.fixture
def run(programs: Programs) -> Run:
    def call(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(ENTRYPOINT), *arguments],
            env=environment(programs, **variables),
            capture_output=True,
            text=True,
            timeout=60,
        )

    return call


def test_a_head_starts_a_node_and_serves(run: Run, programs: Programs) -> None:
    done = run(
        MODEL_PATH=EMBEDDED_MODEL,
        SERVED_MODEL_NAME="qwen qwen-7b",
        TENSOR_PARALLEL_SIZE="4",
        PIPELINE_PARALLEL_SIZE="2",
        MAX_MODEL_LEN="4096",
        GPU_MEMORY_UTILIZATION="0.95",
        PORT="8009",
        SHOAL_SERVE_ARGS="--max-num-seqs 8 --trust-remote-code",
    )
    assert done.returncode == 0, done.stderr
    node, serve, stop = programs.calls()
    assert node == ["shoal", "node", "start", "--head", "--port", "6379"]
    assert serve[:3] == ["shoal", "serve", EMBEDDED_MODEL] and stop == ["shoal", "node", "stop"]
    # The server's own parser understands all of it.
    model, cache, scheduler, parallel, server = options_from_arguments(serve[2:], SERVE_SECTIONS, "model")
    assert (model.max_model_len, model.trust_remote_code, cache.gpu_memory_utilization) == (4096, True, 0.95)
    assert (parallel.tensor_parallel_size, parallel.pipeline_parallel_size) == (4, 2)
    assert parallel.distributed_executor_backend == "auto"  # it takes Ray where the ranks do not fit
    assert (server.served_model_name, server.host, server.port) == (["qwen", "qwen-7b"], "0.0.0.0", 8009)
    assert scheduler.max_num_seqs == 8


def test_quantization_is_handed_on(run: Run, programs: Programs) -> None:
    run(MODEL_PATH=EMBEDDED_MODEL, QUANTIZATION="gptq_marlin")
    assert "--quantization=gptq_marlin" in programs.calls()[1]


@pytest.mark.parametrize("head", ["127.0.0.1", "localhost", "127.0.0.1:7000", "[::1]:7000"])
def test_the_head_is_who_has_the_heads_address(run: Run, programs: Programs, head: str) -> None:
    done = run(MODEL_PATH=EMBEDDED_MODEL, IP_OF_HEAD_NODE=head)
    assert done.returncode == 0, done.stderr
    node = programs.calls()[0]
    port, address = (("7000" if "7000" in head else "6379"), ("::1" if "::1" in head else "127.0.0.1"))
    assert node[:6] == ["shoal", "node", "start", "--head", "--port", port]
    assert node[6] == "--node-ip" and (node[7] == address or head == "localhost")
    (options,) = options_from_arguments(node[3:], (NodeStartOptions,))
    assert options.head and options.head_port == int(port)


@pytest.mark.parametrize(
    ("head", "address"),
    [
        ("203.0.113.7", "203.0.113.7:6379"),
        ("203.0.113.7:7000", "203.0.113.7:7000"),
        ("[2001:db8::7]:7000", "[2001:db8::7]:7000"),
        ("2001:db8::7", "[2001:db8::7]:6379"),
    ],
)
def test_everybody_else_joins_it(run: Run, programs: Programs, head: str, address: str) -> None:
    done = run(IP_OF_HEAD_NODE=head, SHOAL_CLUSTER_TOKEN="x" * 20, MODEL_PATH="/no/such/model")
    assert done.returncode == 0, done.stderr
    assert programs.calls() == [["shoal", "node", "start", "--address", address, "--block"]]
    (options,) = options_from_arguments(programs.calls()[0][3:], (NodeStartOptions,))
    assert options.address == address and options.block


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "MODEL_PATH is not set"),
        ({"MODEL_PATH": "/no/such"}, "MODEL_PATH=/no/such does not exist in the container; mount it"),
        ({"MODEL_PATH": "m", "TENSOR_PARALLEL_SIZE": "two"}, "TENSOR_PARALLEL_SIZE must be a whole number, 1 or more"),
        (
            {"MODEL_PATH": "m", "PIPELINE_PARALLEL_SIZE": "0"},
            "PIPELINE_PARALLEL_SIZE must be a whole number, 1 or more",
        ),
        ({"MODEL_PATH": "m", "MAX_MODEL_LEN": "-1"}, "MAX_MODEL_LEN must be a whole number"),
        ({"MODEL_PATH": "m", "PORT": "70000"}, "PORT must be at most 65535; got '70000'"),
        ({"MODEL_PATH": "m", "GPU_MEMORY_UTILIZATION": "95"}, "GPU_MEMORY_UTILIZATION must be a share above 0"),
        ({"IP_OF_HEAD_NODE": "203.0.113.7"}, "SHOAL_CLUSTER_TOKEN is not set: the head prints it"),
        ({"IP_OF_HEAD_NODE": "no-such-host.invalid"}, "the name 'no-such-host.invalid' does not resolve"),
        (
            {"IP_OF_HEAD_NODE": "127.0.0.1", "NUM_NODES": "2"},
            "IP_OF_HEAD_NODE=127.0.0.1 is 127.0.0.1, each machine itself",
        ),
        ({"IP_OF_HEAD_NODE": "[::1]:6379", "NUM_NODES": "2"}, "is ::1, each machine itself, and NUM_NODES is 2"),
        ({"IP_OF_HEAD_NODE": "a b"}, "IP_OF_HEAD_NODE must be HOST or HOST:PORT"),
    ],
)
def test_errors_say_what_would_work(run: Run, programs: Programs, variables: dict[str, str], message: str) -> None:
    done = run(**variables)
    assert done.returncode == 2 and message in done.stderr, done
    assert programs.calls() == []


def test_a_file_with_the_token_will_do(run: Run, programs: Programs, tmp_path: Path) -> None:
    (tmp_path / ".shoal").mkdir()
    (tmp_path / ".shoal" / "cluster-token").write_text("x" * 20)
    assert run(IP_OF_HEAD_NODE="203.0.113.7").returncode == 0 and len(programs.calls()) == 1


def test_arguments_are_a_command(run: Run, programs: Programs) -> None:
    assert run("shoal", "version", "a b", MODEL_PATH="m").returncode == 0
    assert programs.calls() == [["shoal", "version", "a b"]]
    assert "IP_OF_HEAD_NODE" in run("--help").stdout
    wrong = run("--port", "1")
    assert wrong.returncode == 2 and "a command is expected" in wrong.stderr


def test_the_servers_end_is_the_containers(run: Run, programs: Programs) -> None:
    assert run(MODEL_PATH=EMBEDDED_MODEL, SERVE_CODE="3").returncode == 3
    assert programs.calls()[-1] == ["shoal", "node", "stop"]


def test_a_node_that_does_not_start_is_the_end(run: Run, programs: Programs) -> None:
    assert run(MODEL_PATH=EMBEDDED_MODEL, NODE_CODE="1").returncode == 1
    assert [call[1:3] for call in programs.calls()] == [["node", "start"], ["node", "stop"]]


def test_the_head_waits_for_the_others(run: Run, programs: Programs, tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text(json.dumps({"nodes": [{"is_ray_alive": True}, {"is_ray_alive": None}, {"is_ray_alive": False}]}))
    variables = {"MODEL_PATH": EMBEDDED_MODEL, "NUM_NODES": "2", "STATUS": str(status)}
    done = run(**variables, JOIN_TIMEOUT="2")
    assert done.returncode == 2 and "only 1 of 2 nodes (NUM_NODES) are here after 2 s" in done.stderr
    assert not any(call[1] == "serve" for call in programs.calls())
    status.write_text(json.dumps({"nodes": [{"is_ray_alive": True}, {"is_ray_alive": True}]}))
    assert {"is_ray_alive"} <= set(NodeStatus.__struct_fields__) and "nodes" in Overview.__struct_fields__
    assert run(**variables).returncode == 0
    serve = programs.calls()[-2]
    assert serve[1] == "serve" and "--distributed-executor-backend=ray" in serve


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_server_and_ends_the_node(
    programs: Programs, tmp_path: Path, number: signal.Signals
) -> None:
    serves = tmp_path / "serves"
    process = subprocess.Popen(
        [str(ENTRYPOINT)], env=environment(programs, MODEL_PATH=EMBEDDED_MODEL, SERVES=str(serves)), process_group=0
    )
    try:
        deadline = time.monotonic() + 60
        while not serves.exists() or not serves.read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(30) == 7  # the server's own, after its drain
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert serves.read_text() == "serves\ndrained\n"
    assert [call[1:3] for call in programs.calls()][-1] == ["node", "stop"]


def dockerfiles() -> list[Path]:
    return [ROOT / "deploy" / "docker" / name for name in ("Dockerfile", "Dockerfile.cuda")]


@pytest.mark.parametrize("path", dockerfiles(), ids=lambda path: path.name)
def test_images_are_built_from_what_there_is(path: Path) -> None:
    text = path.read_text()
    ignored = path.with_name(f"{path.name}.dockerignore").read_text().splitlines()
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    for name in [word.removeprefix("./") for word in copied if not word.startswith("--")]:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored, f"{name} is not sent to the build"
    stages = text.split("\nFROM ")
    assert "USER 10001:10001" in stages[-1] and 'ENTRYPOINT ["tini", "--", "shoal-entrypoint"]' in stages[-1]
    assert " tini" in stages[-1] and "entrypoint.sh /usr/local/bin/shoal-entrypoint" in stages[-1]


def test_shellcheck_has_nothing_to_say() -> None:
    shellcheck = ROOT / ".venv" / "bin" / "shellcheck"
    program = str(shellcheck) if shellcheck.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted((ROOT / "deploy").rglob("*.sh"))
    assert len(scripts) >= 2
    subprocess.run([program, *map(str, scripts)], check=True)
