"""Two routers and two servers as processes; one router is killed in mid-stream, and the example client goes on."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal.network import free_port
from tests.chaos.cases import Case, make_cases
from tests.chaos.client import AnswerFold, difference
from tests.router.fakes.process import FakeProcess, fake_servers

ROOT = Path(__file__).parents[3]
NUM_REQUESTS = 12


def _load_example() -> Any:
    spec = importlib.util.spec_from_file_location("resilient_client", ROOT / "examples" / "resilient_client.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = _load_example()


class RouterProcess:
    def __init__(self, port: int, peer_port: int, servers: list[FakeProcess], *flags: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        backends = [argument for server in servers for argument in ("--backend", server.url)]
        command = [
            sys.executable, "-m", "shoal.cli", "router", "--port", str(port), *backends, "--log-level", "warning",
            "--peer", f"http://127.0.0.1:{peer_port}", "--probe-interval", "0.1", "--stall-timeout", "2", *flags,
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)

    def until_ready(self) -> None:
        """It takes requests, and knows that the other one does."""
        _until(lambda: self._answers("/health") and self._peer_is_up())

    def _answers(self, path: str) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(self.url + path, trust_env=False).status_code == 200
        return False

    def _peer_is_up(self) -> bool:
        return any(line.startswith("shoal_router:peer_up") and line.endswith(" 1.0") for line in self._lines())

    def _lines(self) -> list[str]:
        return httpx.get(self.url + "/metrics", trust_env=False).text.splitlines()

    def metric(self, name: str) -> float:
        return sum(float(line.split()[-1]) for line in self._lines() if line.startswith(f"shoal_router:{name}"))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def servers() -> Iterator[list[FakeProcess]]:
    with fake_servers("native", "native", tokens_per_second=25) as servers:
        yield servers


@pytest.fixture
def start_routers(servers: list[FakeProcess]) -> Iterator[Callable[..., list[RouterProcess]]]:
    routers: list[RouterProcess] = []

    def start(*flags: str) -> list[RouterProcess]:
        ports = free_port(), free_port()
        for port, other in (ports, ports[::-1]):
            routers.append(RouterProcess(port, other, servers, *flags))
        for router in routers:
            router.until_ready()
        return routers

    yield start
    for router in routers:
        router.kill()


def cases() -> list[Case]:
    found = make_cases("fake", NUM_REQUESTS, 3, max_tokens=60)
    for case in found:
        case.body.update(max_tokens=50, min_tokens=30)
    return found


def fold(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    folded = AnswerFold()
    for chunk in chunks:
        folded.add(chunk)
    return folded.content()


class Clients:
    """One example client for each request, all at a time, all of which know the routers in the same order."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls
        self.num_chunks = 0
        self.num_resumed = 0
        self._lock = threading.Lock()

    def ask(self, case: Case) -> dict[str, Any]:
        with example.ResilientClient(self.urls, patience=40) as client:
            if not case.streams:
                answer = fold([client.ask(case.path, case.body)])
            else:
                chunks = []
                for chunk in client.stream(case.path, case.body):
                    chunks.append(chunk)
                    with self._lock:
                        self.num_chunks += 1
                answer = fold(chunks)
        with self._lock:
            self.num_resumed += client.num_resumed
        return answer

    def ask_all(self, fault: Callable[[], None]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(NUM_REQUESTS) as threads:
            answers = [threads.submit(self.ask, case) for case in cases()]
            _until(lambda: self.num_chunks > 40 or all(answer.done() for answer in answers))
            fault()
            return [answer.result(60) for answer in answers]


def right_answers(server: FakeProcess) -> list[dict[str, Any]]:
    def ask(case: Case) -> dict[str, Any]:
        with example.ResilientClient([server.url]) as client:
            return fold(
                list(client.stream(case.path, case.body)) if case.streams else [client.ask(case.path, case.body)]
            )

    with ThreadPoolExecutor(NUM_REQUESTS) as threads:
        return list(threads.map(ask, cases()))


@pytest.mark.parametrize(("with_server", "flags"), [(False, ()), (True, ("--replicate-sync",))], ids=["router", "both"])
def test_the_client_goes_on_with_the_other_router(servers, start_routers, with_server, flags):
    # A client of a server alone never sees an id: it is no stream that could be resumed.
    first, second = start_routers(*flags)
    clients = Clients([first.url, second.url])

    def fault() -> None:
        first.kill()
        if with_server:
            servers[0].process.kill()

    answers = clients.ask_all(fault)
    wanted = right_answers(servers[1])
    found = [difference(answer, right) for answer, right in zip(answers, wanted, strict=True)]
    assert found == [None] * NUM_REQUESTS
    assert clients.num_resumed >= NUM_REQUESTS // 2, "the router was killed in the middle"
    assert second.metric("requests_taken_over_total") >= NUM_REQUESTS // 2


def test_a_router_that_is_told_to_end(servers, start_routers):
    """SIGTERM with no time for what runs: the clients hear so, and the other router has everything."""
    first, second = start_routers("--shutdown-timeout", "0")
    clients = Clients([first.url, second.url])
    answers = clients.ask_all(first.process.terminate)
    assert first.process.wait(20) == 0
    wanted = right_answers(servers[1])
    assert [difference(one, right) for one, right in zip(answers, wanted, strict=True)] == [None] * NUM_REQUESTS
    assert second.metric("requests_taken_over_total") >= NUM_REQUESTS // 2


def test_nobody_is_there():
    client = example.ResilientClient(["http://127.0.0.1:1"], patience=0.3)
    with client, pytest.raises(TimeoutError, match="no router went on"):
        client.ask("/v1/completions", {"prompt": "x"})


def test_the_example_by_hand(start_routers):
    urls = [router.url for router in start_routers()]
    client = example.ResilientClient(urls)
    with client, pytest.raises(example.RequestFailed, match="'none' is not served here"):
        list(client.stream("/v1/completions", {"model": "none", "prompt": "x"}))
    command = [
        sys.executable,
        "examples/resilient_client.py",
        "--model",
        "fake",
        "--max-tokens",
        "30",
        "--router",
        *urls,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
    text, end, _ = done.stdout.partition("\n(went on 0 times)\n")
    assert text and end
