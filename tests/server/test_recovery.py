"""`serve` as a process whose core, or a rank of it, is killed: streams end as if nothing had happened, and nothing of
what died is left."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from shoal.config.options import ServerOptions
from shoal.config.parallel import ParallelConfig
from shoal.engine.restart_budget import RestartLimits
from shoal.server.run import restart_limits
from tests.engine.fake_client import make_config
from tests.server.live_server import error_of, live_server
from tests.server.serving import make_model, serving, streaming


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "model")


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, without what no two of them share. Fails unless it ended well."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]", lines[-1]
    return [json.loads(line) for line in lines[:-1]]


def token_ids(text: str) -> list[int]:
    return [id_ for event in events_of(text) for choice in event["choices"] for id_ in choice["token_ids"]]


# --- a core that runs no model ---------------------------------------------------------------------------------------


def test_a_core_that_is_killed_comes_back_and_streams_go_on(model: Path) -> None:
    with serving(model, "--pause", "0.01") as server:
        server.until_ready()
        first = server.core()
        with streaming(server, 400) as stream:
            first.kill()
            # What comes in between waits too, streamed or not.
            server.until(lambda: "starting it again, attempt 1 of 5" in server.output)
            refused = httpx.get(server.url + "/readyz", trust_env=False)
            if refused.status_code != 200:  # it may be back already
                message = error_of(refused, 503)["message"]
                assert "the engine is restarting (attempt 1 of 5): the engine core was killed by signal 9" in message
            body = {"prompt": [1], "max_tokens": 5, "return_token_ids": True}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, trust_env=False, timeout=40)
            assert answer.json()["choices"][0]["token_ids"] == [300, 301, 302, 303, 304]
            assert token_ids(stream.result(40).text) == [300 + i % 50 for i in range(400)]
        assert not first.is_running() and server.core().pid != first.pid
        server.until(lambda: server.status("/health") == 200)
        assert "1 of the 1 answers that were in the lost core go on" in server.output
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert "Traceback" not in server.output


def test_when_it_dies_too_often_the_server_ends_with_the_reason(model: Path) -> None:
    with serving(model, "--pause", "0.05", max_engine_restarts=1) as server:
        server.until_ready()
        with streaming(server, 500) as stream:
            server.core().kill()
            server.until(lambda: "is back as generation 1" in server.output)
            server.core().kill()
            last = json.loads(stream.result(40).text.strip().splitlines()[-1].removeprefix("data: "))
        said = "the engine core was killed by signal 9.*; it is not started again after 1 restarts within 600 s"
        assert re.match(said, last["error"]["message"])
        assert last["error"]["code"] == "engine_lost"
        assert server.wait() == 1
        assert re.search(f"error: {said}", server.output)
        assert "Traceback" not in server.output


def test_ctrl_c_during_a_restart_ends_it_all(model: Path) -> None:
    with serving(model, "--load-seconds", "2", shutdown_timeout=0) as server:
        server.until_ready()
        server.core().kill()
        server.until(lambda: "starting it again" in server.output)
        server.until(lambda: len(server.cores()) == 1)
        (core,) = server.cores()
        assert server.status("/livez") == 200 and server.status("/readyz") == 503 and server.status("/health") == 503
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0
        assert not core.is_running()


def test_a_replica_that_is_killed_comes_back_and_its_streams_go_on_elsewhere(model: Path) -> None:
    with serving(model, "--pause", "0.01", num_replicas=2) as server:
        server.until_ready()
        with streaming(server, 300) as one, streaming(server, 300) as other:
            server.cores()[0].kill()
            for stream in (one, other):
                assert token_ids(stream.result(40).text) == [300 + i % 50 for i in range(300)]
        server.until(lambda: "replica 0 is there again: 2 of 2" in server.output)
        assert httpx.get(server.url + "/health", trust_env=False).json() == {"status": "ok", "replicas": "2 of 2"}


# --- the real one ----------------------------------------------------------------------------------------------------


@contextmanager
def shoal_serve(directory: Path, *arguments: str) -> Iterator[tuple[psutil.Process, str]]:
    """`shoal serve` on shoal-tiny; its process and address. At the end nothing of it is left."""
    command = [sys.executable, "-m", "shoal.cli", "serve", "--device", "cpu", "--port", "0"]
    command += ["--kv-cache-memory", "128MiB", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(directory), "OMP_NUM_THREADS": "1"}
    shared = set(os.listdir("/dev/shm"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            lines = list(itertools.takewhile(lambda line: "Ctrl-C" not in line, process.stdout))
            found = re.search(r"http://127.0.0.1:\d+", "".join(lines))
            assert found is not None, lines
            own = psutil.Process(process.pid)
            yield own, found[0]
            children = own.children(recursive=True)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert not list(directory.iterdir())
    assert {name for name in os.listdir("/dev/shm") if "shoal" in name} <= shared


def stream_and_kill(url: str, body: dict[str, Any], victim: psutil.Process | None) -> tuple[str, float]:
    """The text of a stream, and the longest pause in it. victim: is killed in the middle."""
    text, pause, last = "", 0.0, 0.0
    with (
        httpx.Client(timeout=120, trust_env=False) as http,
        http.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as response,
    ):
        for number, line in enumerate(line for line in response.iter_lines() if line):
            now = time.monotonic()
            pause, last = max(pause, now - last if last else 0.0), now
            if line.endswith("[DONE]"):
                return text, pause
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            text += event["choices"][0]["text"]
            if number == 10 and victim is not None:
                victim.kill()
    raise AssertionError("the stream was cut off")


@pytest.mark.parametrize("arguments", [(), ("-tp", "2")], ids=["the core", "a rank"])
def test_shoal_serve_carries_streams_over_a_kill(arguments: tuple[str, ...], tmp_path: Path) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 40, "ignore_eos": True, "seed": 7, "temperature": 0.9}
    with shoal_serve(tmp_path, *arguments) as (process, url):
        undisturbed, _ = stream_and_kill(url, body, None)
        below = process.children(recursive=True)
        assert len(below) == (3 if arguments else 1)
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(stream_and_kill, url, body, None)
            text, pause = stream_and_kill(url, body, below[-1])
            assert text == beside.result(120)[0] == undisturbed
        print(f"{' '.join(arguments) or 'one rank'}: {pause:.2f} s from the kill to the next token")
        assert not any(old.is_running() and old.status() != psutil.STATUS_ZOMBIE for old in below)
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200


# --- what requests and options say -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["soon", "-1", "0", "inf", "nan", ""])
def test_a_deadline_is_a_number_of_seconds(value: str) -> None:
    with live_server() as server, server.client() as http:
        for path, content in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ):
            response = http.post(path, json={**content, "max_tokens": 2}, headers={"x-shoal-deadline": value})
            message = error_of(response, 400)["message"]
            assert (
                f"x-shoal-deadline must be one number of seconds above 0, such as 20 or 0.5; got {value!r}" in message
            )


def test_a_deadline_reaches_the_journal() -> None:
    with live_server() as server, server.client() as http:
        seconds: list[float] = []
        running = server.engine.running

        def note(prepared: Any, **options: Any) -> Any:
            seconds.append(prepared.deadline_seconds)
            return running(prepared, **options)

        server.engine.running = note  # type: ignore[method-assign]
        for headers in ({"x-shoal-deadline": "2.5"}, {}):
            body = {"prompt": ["a", "b"], "max_tokens": 2}
            assert http.post("/v1/completions", json=body, headers=headers).status_code == 200
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        assert http.post("/v1/chat/completions", json=chat, headers={"x-shoal-deadline": "7"}).status_code == 200
    assert seconds == [2.5, 2.5, 60.0, 60.0, 7.0]


def test_an_engine_over_several_nodes_ends_with_them() -> None:
    options = ServerOptions(max_engine_restarts=3, engine_restart_window=60.0)
    assert restart_limits(make_config(), options) == RestartLimits(3, 60.0)
    several = ParallelConfig(tensor_size=2, backend="mp", num_nodes=2, master_address="127.0.0.1")
    assert restart_limits(make_config(parallel=several), options).max_restarts == 0
