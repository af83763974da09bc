"""`serve` with several engine cores: what it says of them, and what the end of one or of all means."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from shoal.config.options import ModelOptions, ServerOptions
from shoal.config.parallel import ParallelConfig
from shoal.engine.async_engine import AsyncEngine
from shoal.engine.replicas import ReplicatedClient
from shoal.messages import CoreReady
from shoal.observability.metrics import EngineMetrics
from shoal.server.app import create_app
from shoal.server.observer import MetricsObserver
from shoal.server.startup import describe_engine
from tests.engine.fake_client import FakeClient, make_config
from tests.engine.test_async_engine import until
from tests.engine.tokenizers_for_tests import tokenizer
from tests.server.serving import Serving, make_model, serving, streaming


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "model")


def get(server: Serving, path: str) -> Any:
    response = httpx.get(server.url + path, trust_env=False)
    assert response.status_code == 200, response.text
    return response.json() if path != "/metrics" else response.text


def tokens_and_end(text: str) -> tuple[int, str]:
    """How many tokens a stream brought, and "[DONE]" or the error it ended with."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    num_tokens = sum(len(choice["token_ids"]) for e in events[:-1] for choice in json.loads(e).get("choices", ()))
    return num_tokens, events[-1] if events[-1] == "[DONE]" else json.loads(events[-1])["error"]["message"]


def test_one_of_two_dies_and_the_other_goes_on_until_it_dies_too(model: Path) -> None:
    with serving(model, "--pause", "0.02", num_replicas=2, max_engine_restarts=0) as server:
        server.until_ready()
        assert "2 replicas in float32 on no device" in server.output
        assert "KV cache: 2,048 tokens (2 MiB), 4.0 requests of the full 512 tokens" in server.output
        engine = get(server, "/version")["engine"]
        assert len(engine["replicas"]) == engine["data_parallel_size"] == 2
        assert engine["tensor_parallel_size"] == engine["pipeline_parallel_size"] == 1
        assert get(server, "/health") == {"status": "ok", "replicas": "2 of 2"}
        with streaming(server, 200) as first, streaming(server, 200) as second:
            server.cores()[0].kill()
            ends = sorted(tokens_and_end(stream.result(40).text) for stream in (first, second))
        assert ends[1] == (200, "[DONE]"), "the other one never noticed"
        assert ends[0][1].startswith("replica 0 is gone: the engine core was killed by signal 9")
        assert "): 1 of its requests end with an error; 1 of 2 replicas go on" in server.output
        # It serves on, and says how.
        for path in ("/livez", "/readyz", "/health", "/ping"):
            assert get(server, path) == {"status": "ok", "replicas": "1 of 2"}
        for _ in range(3):
            body = {"prompt": [1], "max_tokens": 3}
            assert httpx.post(f"{server.url}/v1/completions", json=body, trust_env=False).status_code == 200
        metrics = get(server, "/metrics")
        assert re.findall(r"shoal:replica_up\{.*\} (\d)", metrics) == ["0", "1"]
        ended = dict(re.findall(r'shoal:request_success_total\{finished_reason="(\w+)".*\} (\d+)', metrics))
        assert ended == {"stop": "0", "length": "4", "abort": "0", "error": "1"}
        server.core().kill()
        assert server.wait() == 1
        assert "error: all 2 replicas are gone: replica 0: the engine core was killed by signal 9" in server.output
        assert "Traceback" not in server.output


def test_drains_all_and_leaves_nothing(model: Path) -> None:
    with serving(model, "--pause", "0.02", num_replicas=2) as server:
        server.until_ready()
        cores = server.cores()
        with streaming(server, 100) as first, streaming(server, 100) as second:
            server.process.send_signal(signal.SIGTERM)
            server.until(lambda: server.status("/health") == 503)
            refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": [1]}, trust_env=False)
            assert refused.status_code == 503
            assert [tokens_and_end(stream.result(40).text) for stream in (first, second)] == [(100, "[DONE]")] * 2
        assert server.wait() == 0
        assert not any(core.is_running() for core in cores)


def test_a_second_ctrl_c_does_not_wait_for_any_of_them(model: Path) -> None:
    with serving(model, "--pause", "0.5", num_replicas=2, shutdown_timeout=1000) as server:
        server.until_ready()
        cores = server.cores()
        for core in cores:
            core.suspend()  # nothing that one could ask them reaches them
        server.process.send_signal(signal.SIGINT)
        server.until(lambda: server.status("/health") == 503)
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0
        assert not any(core.is_running() for core in cores)


def test_a_server_that_is_killed_takes_all_its_cores_along(model: Path) -> None:
    with serving(model, num_replicas=2) as server:
        server.until_ready()
        cores = server.cores()
        assert len(cores) == 2
        server.process.kill()
        _, alive = psutil.wait_procs(cores, timeout=20)
        assert not alive


def test_ctrl_c_while_they_start_ends_them_at_once(model: Path) -> None:
    with serving(model, "--load-seconds", "60", num_replicas=2) as server:
        server.until(lambda: "load weights" in server.output)
        cores = server.cores()
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0
        assert not any(core.is_running() for core in cores)


def test_one_that_dies_while_they_start_ends_them_all(model: Path) -> None:
    with serving(model, "--load-seconds", "60", num_replicas=2) as server:
        server.until(lambda: "load weights" in server.output)
        server.cores()[1].kill()
        assert server.wait() == 1
        assert "error: replica 1 of 2: the engine core was killed by signal 9" in server.output


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_shoal_serve_with_real_cores_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shoal.cli", "serve", "-dp", "2", "--device", "cpu", "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command += ["--skip-tokenizer-init", "--kv-cache-memory", "128MiB"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            lines = list(itertools.takewhile(lambda line: "Ctrl-C" not in line, process.stdout))
            found = re.search(r"http://127.0.0.1:\d+", "".join(lines))
            assert found is not None and "2 replicas in float32" in lines[0], lines
            children = psutil.Process(process.pid).children(recursive=True)
            assert len(children) == 2
            body = {"prompt": [5, 6, 7], "max_tokens": 4, "n": 4, "ignore_eos": True}
            answer = httpx.post(f"{found[0]}/v1/completions", json=body, trust_env=False, timeout=60).json()
            assert answer["usage"]["completion_tokens"] == 16
            process.send_signal(number)
            assert process.wait(60) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        finally:
            process.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert not list(tmp_path.iterdir())


def test_the_first_line_says_how_the_work_is_shared_and_where() -> None:
    def first_line(info: dict[str, Any], **sizes: int) -> str:
        ready = CoreReady(0, 256, 17, 16, {"device": "NVIDIA H200", **info})
        return describe_engine(make_config(parallel=ParallelConfig(**sizes)), ready, 3.0)[0]

    assert "float32 on NVIDIA H200, deterministic, up after 3.0 s" in first_line({"hosts": ["a"]})
    assert ", TP=2 in float32 on NVIDIA H200," in first_line({"hosts": ["a"]}, tensor_size=2)
    spread = first_line({"hosts": ["a", "b"]}, data_size=2, tensor_size=4, pipeline_size=3)
    assert "2 replicas × TP=4 × PP=3 in float32 on NVIDIA H200 of a, b," in spread


# --- probes and metrics over cores in this process -------------------------------------------------------------------


@contextlib.asynccontextmanager
async def over_two(**options: Any) -> AsyncIterator[tuple[httpx.AsyncClient, AsyncEngine, list[FakeClient]]]:
    config = make_config()
    cores = [FakeClient(config) for _ in range(2)]
    client, metrics = ReplicatedClient(cores), EngineMetrics("tiny")
    await client.start()
    engine = AsyncEngine(client, config, tokenizer(), observer=MetricsObserver(metrics), **options)
    await engine.start()
    app = create_app(engine, ServerOptions(served_model_name=["tiny"]), ModelOptions(model="tiny"), metrics=metrics)
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            yield http, engine, cores
    finally:
        await engine.close()


async def test_a_frozen_one_among_healthy_ones_shows() -> None:
    async with over_two(progress_timeout=0.5) as (http, engine, cores):
        cores[0].gate.clear()
        pending = [http.post("/v1/completions", json={"prompt": "a", "max_tokens": 100}) for _ in range(2)]
        frozen, fine = [asyncio.create_task(one) for one in pending]
        await until(lambda: engine.stalled)
        assert [(await http.get(path)).status_code for path in ("/livez", "/readyz", "/health")] == [200, 200, 503]
        message = (await http.get("/health")).json()["error"]["message"]
        assert message == "replica 0 makes no progress although there is work"
        assert (await fine).status_code == 200
        cores[0].gate.set()
        assert (await frozen).status_code == 200
        assert (await http.get("/health")).json() == {"status": "ok", "replicas": "2 of 2"}


async def test_a_request_whose_replica_dies_may_be_sent_again() -> None:
    async with over_two() as (http, _, cores):
        body = {"prompt": "a", "max_tokens": 100}
        cores[0].gate.clear()
        task = asyncio.create_task(http.post("/v1/completions", json=body))
        await until(lambda: cores[0].running)
        cores[0].die()
        lost = await task
        assert lost.status_code == 503 and lost.headers["retry-after"]
        assert lost.json()["error"]["code"] == "engine_lost"
        assert (await http.post("/v1/completions", json=body)).status_code == 200


async def test_metrics_tell_the_replicas_apart() -> None:
    async with over_two() as (http, _, _):
        for max_tokens in (4, 9):
            body = {"prompt": "a", "max_tokens": max_tokens}
            assert (await http.post("/v1/completions", json=body)).status_code == 200
        text = (await http.get("/metrics")).text
        steps = re.findall(r'shoal:engine_steps_total\{model_name="tiny",replica="(\d)"\} (\S+)', text)
        assert [(replica, float(value)) for replica, value in steps] == [("0", 4.0), ("1", 9.0)]
