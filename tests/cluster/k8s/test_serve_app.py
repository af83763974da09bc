"""The application of a RayService: a replica with a server behind it, alone and under Ray Serve itself."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import yaml

from shoal.cluster.k8s.forms import render
from shoal.cluster.k8s.serve_app import AppArguments, ServerReplica, build
from shoal.errors import ConfigError, StartupError
from tests.cluster.k8s.test_render import by_kind, request

pytest.importorskip("ray")

# As in Ray Serve, where a replica has one loop for all its requests.
one_loop = pytest.mark.asyncio(loop_scope="module")
PROGRAM = [sys.executable, str(Path(__file__).parents[1] / "deploy_server.py")]
FLAGS = ["model", "--served-model-name=model"]


def arguments(**changes: Any) -> AppArguments:
    return AppArguments(**{"flags": FLAGS, "drain_seconds": 10.0, "start_seconds": 60.0, **changes})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replica() -> AsyncIterator[ServerReplica]:
    made = ServerReplica(arguments(), PROGRAM)
    yield made
    await made.stop()
    assert made.report().state == "stopped"


@pytest_asyncio.fixture(loop_scope="module")
async def http(replica: ServerReplica) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(replica), base_url="http://ray") as client:
        yield client


@one_loop
async def test_requests_and_answers_pass_through(http: httpx.AsyncClient) -> None:
    answer = await http.post(
        "/v1/completions", json={"model": "model", "prompt": "hello", "max_tokens": 3}, headers={"x-request-id": "mine"}
    )
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3
    assert answer.headers["x-request-id"] == "mine"
    assert (await http.get("/v1/models?x=1%2F2")).json()["data"][0]["id"] == "model"
    wrong = await http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert wrong.status_code == 400 and "error" in wrong.json()
    assert (await http.get("/no/such/path")).status_code == 404


@one_loop
async def test_a_stream_comes_piece_by_piece(replica: ServerReplica) -> None:
    body = json.dumps({"model": "model", "prompt": "hello", "max_tokens": 20, "stream": True}).encode()
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
    }  # fmt: skip
    pieces: list[tuple[float, bytes]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        pieces.append((time.monotonic(), message.get("body", b"")))

    await replica(scope, receive, send)
    assert b"".join(piece for _, piece in pieces).rstrip().endswith(b"data: [DONE]")
    assert len(pieces) > 5 and pieces[-1][0] - pieces[1][0] > 0.1  # the fake server takes 25 ms a token


@one_loop
async def test_health_is_the_servers(replica: ServerReplica, http: httpx.AsyncClient) -> None:
    replica.check()
    before = replica.report()
    assert before.pid is not None
    os.kill(before.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    with pytest.raises(StartupError, match="the server is "):
        while time.monotonic() < deadline:
            replica.check()
            await asyncio.sleep(0.02)
    refused = await http.get("/v1/models")
    assert refused.status_code in (200, 503)  # it may be back already
    while replica.report().state != "ready":
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    replica.check()
    assert replica.report().pid != before.pid and (await http.get("/v1/models")).status_code == 200


def test_a_server_that_does_not_come_up() -> None:
    began = time.monotonic()
    with pytest.raises(StartupError, match="does not come up: .*the weights of broken are broken"):
        ServerReplica(arguments(flags=["broken", "--served-model-name=x"]), PROGRAM)
    assert time.monotonic() - began < 60


def test_a_server_that_takes_too_long() -> None:
    with pytest.raises(StartupError, match="was not ready within 0 s"):
        ServerReplica(arguments(start_seconds=0.0), PROGRAM)


needs_serve = pytest.mark.skipif(importlib.util.find_spec("grpc") is None, reason="ray[serve] is not installed")


needs_namespaces = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")


@needs_serve
def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="args of the application"):
        build({"flags": "no list"})
    with pytest.raises(ConfigError, match="args of the application"):
        build({"flags": [], "num_gpu": 1})


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """Ray's sockets lie in it, whose paths must be short."""
    with tempfile.TemporaryDirectory(prefix="ray-") as directory:
        yield Path(directory)


@pytest.mark.slow
@pytest.mark.timeout(400)
@needs_serve
@needs_namespaces
def test_the_rendered_config_runs_under_ray_serve(short_directory: Path) -> None:
    """In a process of its own: Ray Serve's processes end with it."""
    service = by_kind(render(request("rayservice", replicas=1)), "RayService")["qwen"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    application["args"] |= {
        "flags": ["shoal-tiny", "--max-num-seqs=4"],
        "num_gpus": 0,
        "num_cpus": 1,
        "needs_ray": False,
    }
    script = short_directory / "script.py"
    script.write_text(_SCRIPT)
    # Processes of their own kind in a namespace of their own end with the first of them.
    command = [
        "unshare",
        "-p",
        "-f",
        "--mount-proc",
        sys.executable,
        str(script),
        json.dumps(application),
        str(short_directory),
    ]
    variables = {
        **os.environ,
        "SHOAL_API_KEY": "a-key-of-this-test",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, env=variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((short_directory / "found").read_text())  # Ray writes to the output, too
    assert found == {"without a key": 401, "tokens": 5, "events": found["events"], "status": "RUNNING"}
    assert found["events"] > 3


_SCRIPT = """
import importlib, json, pathlib, socket, sys
import httpx, ray
from ray import serve

application, directory = json.loads(sys.argv[1]), sys.argv[2]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(num_cpus=2, include_dashboard=False, logging_level="error", _temp_dir=directory)
serve.start(http_options={"host": "127.0.0.1", "port": port})
module, name = application["import_path"].split(":")
app = getattr(importlib.import_module(module), name)(application["args"])
serve.run(app, name=application["name"], route_prefix=application["route_prefix"])
url, body = f"http://127.0.0.1:{port}/v1/completions", {"prompt": "hello", "max_tokens": 5, "ignore_eos": True}
key = {"authorization": "Bearer a-key-of-this-test"}
answer = httpx.post(url, json=body, headers=key, timeout=60)
with httpx.stream("POST", url, json={**body, "stream": True}, headers=key, timeout=60) as stream:
    events = [line for line in stream.iter_lines() if line.startswith("data: ")]
pathlib.Path(directory, "found").write_text(json.dumps({
    "without a key": httpx.post(url, json=body, timeout=60).status_code,
    "tokens": answer.json()["usage"]["completion_tokens"],
    "events": len(events),
    "status": serve.status().applications[application["name"]].status.value,
}))
serve.shutdown()
"""
