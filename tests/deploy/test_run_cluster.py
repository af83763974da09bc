"""deploy/run_cluster.sh, with a `docker` that writes down how it was called and plays a container."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.cli.client_options import NodeStartOptions
from shoal.config.sources import options_from_arguments
from tests.deploy.programs import ROOT, Programs

SCRIPT = ROOT / "deploy" / "run_cluster.sh"
TOKEN = "a-token-of-this-test"
OWN, OTHER = "10.11.12.13", "10.11.12.14"
# `run` lives until `stop` or `rm`, or ends at once with CODE.
DOCKER = """
stopped = os.environ["STATE"] + "/stopped"
match sys.argv[1:2]:
    case ["container"]:
        sys.exit(0 if "EXISTS" in os.environ else 1)
    case ["stop"] | ["rm"]:
        open(stopped, "w").close()
    case ["run"]:
        with open(os.environ["STATE"] + "/token", "w") as file:
            file.write(os.environ["SHOAL_CLUSTER_TOKEN"])
        if "CODE" in os.environ:
            sys.exit(int(os.environ["CODE"]))
        while not os.path.exists(stopped):
            time.sleep(0.05)
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    made = Programs(tmp_path)
    made.add("docker", DOCKER)
    made.add("hostname", f"print('{OWN} 2001:db8::13 ')")
    return made


@pytest.fixture
def hf_home(tmp_path: Path) -> Path:
    path = tmp_path / "hugging face"
    path.mkdir()
    return path


def environment(programs: Programs, **variables: str) -> dict[str, str]:
    return {
        "PATH": f"{programs.directory}:{os.environ['PATH']}",
        "STATE": str(programs.directory.parent),
        **variables,
    }


@pytest.fixture
def run(programs: Programs) -> Run:
    def call(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCRIPT), *map(str, arguments)],
            env=environment(programs, **variables),
            capture_output=True,
            text=True,
            timeout=60,
        )

    return call


def docker_calls(programs: Programs) -> list[list[str]]:
    return [call[1:] for call in programs.calls() if call[0] == "docker"]


def node_options(call: list[str], image: str) -> NodeStartOptions:
    """What the container runs, as the command itself parses it."""
    command = call[call.index(image) + 1 :]
    assert command[:3] == ["shoal", "node", "start"]
    (options,) = options_from_arguments(command[3:], (NodeStartOptions,))
    assert options.block
    return options


def test_a_head(run: Run, programs: Programs, hf_home: Path, tmp_path: Path) -> None:
    done = run("shoal:1", OWN, "--head", hf_home, "--gpus", "all", "-v", "/a b:/c", CODE="0")
    assert done.returncode == 0, done.stderr
    inspect, ran, stop, remove = docker_calls(programs)
    assert inspect == ["container", "inspect", "shoal-head"]
    assert ran[:5] == ["run", "--name", "shoal-head", "--network", "host"]
    assert ran[5:7] == ["--ipc", "host"] and f"{hf_home}:/hf" in ran and "HF_HOME=/hf" in ran
    image = ran.index("shoal:1")
    assert ran[image - 4 : image] == ["--gpus", "all", "-v", "/a b:/c"]
    options = node_options(ran, "shoal:1")
    assert options.head and options.node_ip == OWN and options.head_port == 6379
    token = (tmp_path / "token").read_text()
    assert re.fullmatch(r"[0-9a-f]{64}", token)
    assert not any(token in word for word in ran), "a command line is seen by everybody on the machine"
    assert f"SHOAL_CLUSTER_TOKEN={token} {SCRIPT} shoal:1 {OWN} --worker HF_HOME" in done.stdout
    assert stop[0] == "stop" and remove == ["rm", "--force", "shoal-head"]


def test_a_worker(run: Run, programs: Programs, hf_home: Path, tmp_path: Path) -> None:
    done = run(
        "shoal:1", OTHER, "--worker", hf_home, SHOAL_CLUSTER_TOKEN=TOKEN, CODE="0", SHM_SIZE="16g", HEAD_PORT="7000"
    )
    assert done.returncode == 0, done.stderr
    ran = docker_calls(programs)[1]
    assert ran[2] == "shoal-worker" and ran[5:7] == ["--shm-size", "16g"] and "host" not in ran[5:]
    options = node_options(ran, "shoal:1")
    assert not options.head and options.address == f"{OTHER}:7000"
    assert (tmp_path / "token").read_text() == TOKEN and done.stdout == ""


def test_ipv6_and_a_name_of_ones_own(run: Run, programs: Programs, hf_home: Path) -> None:
    variables = {"SHOAL_CLUSTER_TOKEN": TOKEN, "CODE": "0", "CONTAINER_NAME": "mine"}
    assert run("i", "2001:db8::14", "--worker", hf_home, **variables).returncode == 0
    ran = docker_calls(programs)[1]
    assert ran[2] == "mine" and node_options(ran, "i").address == "[2001:db8::14]:6379"


def test_the_containers_end_is_the_scripts(run: Run, programs: Programs, hf_home: Path) -> None:
    assert run("i", OWN, "--head", hf_home, CODE="5").returncode == 5
    assert [call[0] for call in docker_calls(programs)] == ["container", "run", "stop", "rm"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)])
def test_a_signal_stops_and_removes_the_container(
    programs: Programs, hf_home: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = subprocess.Popen(
        [str(SCRIPT), "i", OWN, "--head", str(hf_home)],
        env=environment(programs),
        process_group=0,
        stdout=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "token").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(30) == code
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert [call[0] for call in docker_calls(programs)] == ["container", "run", "stop", "rm"]


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "are needed; got 0 of these"),
        (["i", OWN, "--head"], {}, "are needed; got 3 of these"),
        (["--rm", OWN, "--head", "{hf}"], {}, "IMAGE must name an image; got '--rm'"),
        (
            ["i", "head.example", "--head", "{hf}"],
            {},
            "HEAD_IP must be an address, such as 10.0.0.1; got 'head.example'",
        ),
        (["i", "10.0.0.300", "--head", "{hf}"], {}, "HEAD_IP must be an address"),
        (["i", "127.0.0.1", "--head", "{hf}"], {}, "HEAD_IP 127.0.0.1 is each machine itself"),
        (["i", OTHER, "--head", "{hf}"], {}, f"HEAD_IP {OTHER} is no address of this machine, .* it has: {OWN}"),
        (["i", OWN, "--worker", "{hf}"], {"SHOAL_CLUSTER_TOKEN": TOKEN}, "start it with --head, or name another head"),
        (["i", OWN, "head", "{hf}"], {}, "the third argument must be --head or --worker; got 'head'"),
        (["i", OWN, "--head", "cache"], {}, "HF_HOME must be an absolute path; got 'cache'"),
        (["i", OWN, "--head", "{hf}/no"], {}, "there is no directory .*/no on this machine"),
        (["i", OTHER, "--worker", "{hf}"], {}, "SHOAL_CLUSTER_TOKEN is not set: the head printed it"),
        (["i", OTHER, "--worker", "{hf}"], {"SHOAL_CLUSTER_TOKEN": "short"}, "must be 16 or more characters"),
        (["i", OWN, "--head", "{hf}"], {"HEAD_PORT": "0"}, "HEAD_PORT must be a port from 1 to 65528; got '0'"),
        (["i", OWN, "--head", "{hf}"], {"SHM_SIZE": "big"}, "SHM_SIZE must be a size such as 16g; got 'big'"),
        (["i", OWN, "--head", "{hf}"], {"CONTAINER_NAME": "a b"}, "CONTAINER_NAME must be letters"),
        (
            ["i", OWN, "--head", "{hf}"],
            {"EXISTS": "1"},
            "there is a container shoal-head already: docker rm -f shoal-head",
        ),
        (["i", OWN, "--head", "{hf}", "-d"], {}, "-d: this script waits for the container"),
        (["i", OWN, "--head", "{hf}", "-itd"], {}, "-itd: this script waits for the container"),
        (["i", OWN, "--head", "{hf}", "-dit"], {}, "-dit: this script waits for the container"),
        (["i", OWN, "--head", "{hf}", "--ipc=private"], {}, "--ipc=private: the ranks .* SHM_SIZE=16g"),
        (["i", OWN, "--head", "{hf}", "--ipc", "private"], {}, "--ipc: the ranks"),
        (["i", OWN, "--head", "{hf}:ro"], {}, "HF_HOME must have no ':' in it"),
        (["i", OWN, "--head", "{hf}", "--name=x"], {}, "the container's name is CONTAINER_NAME="),
        (["i", OWN, "--head", "{hf}", "--network=bridge"], {}, "the nodes need the machine's own network"),
    ],
)
def test_errors_say_what_would_work(
    run: Run, programs: Programs, hf_home: Path, arguments: list[str], variables: dict[str, str], message: str
) -> None:
    done = run(*(argument.format(hf=hf_home) for argument in arguments), **variables)
    assert done.returncode == 2 and re.search(message, done.stderr), done
    assert not any(call[0] in ("run", "stop", "rm") for call in docker_calls(programs)), "it is not its container"


def test_without_docker(programs: Programs, hf_home: Path, run: Run) -> None:
    (programs.directory / "docker").unlink()
    for name in ("bash", "env", "cat", "od", "tr"):
        found = next(Path(folder) / name for folder in os.environ["PATH"].split(":") if (Path(folder) / name).exists())
        (programs.directory / name).symlink_to(found)
    done = run("i", OWN, "--head", hf_home, PATH=str(programs.directory))
    assert done.returncode == 2 and "there is no docker on this machine's PATH" in done.stderr


def test_help(run: Run) -> None:
    done = run("--help")
    assert done.returncode == 0 and "--head|--worker HF_HOME" in done.stdout
