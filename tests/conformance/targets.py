"""What the conformance tests run against, and the one table of what some of these cannot do.

A Shoal server (shoal-tiny on the CPU) and a server that looks like vLLM's, each directly and behind a router, and both
behind one router under one name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar

import httpx
import psutil

from shoal.network import free_port
from tests.router.fakes.native import MODEL
from tests.router.fakes.process import FakeProcess

KEY = "conformance-key"
MAX_MODEL_LEN = 1024
TARGETS = ("shoal", "vllm", "router-shoal", "router-vllm", "router-mixed")

_MIXED = "two models answer under one name, each with its own tokenizer"
_LATER = "neither server has it"
# What a target lacks, by the feature's name: the tests that need it are skipped there by this name and for this reason.
LACKS: dict[str, dict[str, str]] = {
    # The same request gets the same answer, and may be compared with a variant of itself.
    "one-model": {"router-mixed": _MIXED},
    # 401 has OpenAI's error object.
    "error-object-401": {"vllm": "vLLM's middleware answers with a plain string"},
    # Functions that the model may call; answers that are JSON.
    "tools": dict.fromkeys(TARGETS, _LATER),
    "json": dict.fromkeys(TARGETS, _LATER),
    # The metrics of the router count what is under way, and it shows what it has sent where.
    "router": dict.fromkeys(("shoal", "vllm"), "there is none"),
    "several-servers": dict.fromkeys(TARGETS[:4], "there is one server"),
}

_Test = TypeVar("_Test", bound=Callable[..., object])


def needs(feature: str) -> Callable[[_Test], _Test]:
    """A test of targets that have this feature of LACKS."""
    return _with_features("needs", feature)


def without(feature: str) -> Callable[[_Test], _Test]:
    """A test of targets that lack this feature: they have to say so."""
    return _with_features("lacks", feature)


def _with_features(kind: str, feature: str) -> Callable[[_Test], _Test]:
    assert feature in LACKS, f"{feature!r} is not in the table"

    def mark(test: _Test) -> _Test:
        setattr(test, kind, (*getattr(test, kind, ()), feature))
        return test

    return mark


def why_skipped(test: object, target: str) -> str | None:
    """Why a test is not for this target."""
    for feature in getattr(test, "needs", ()):
        if target in LACKS[feature]:
            return f"{target} lacks {feature!r}: {LACKS[feature][target]}"
    for feature in getattr(test, "lacks", ()):
        if target not in LACKS[feature]:
            return f"{target} has {feature!r}"
    return None


_RUNNING = re.compile(r"^(?:shoal|vllm):num_requests_(?:running|waiting)\S* (\S+)$", re.MULTILINE)
_GENERATED = re.compile(r"^(?:shoal|vllm):generation_tokens_total\S* (\S+)$", re.MULTILINE)
_UP_SECONDS = 120.0
_ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Target:
    """url: what clients speak to. servers: the URLs of the engines behind it, or its own."""

    name: str
    url: str
    servers: tuple[str, ...]

    def num_unfinished(self) -> int:
        """Requests in the engines."""
        return int(self._sum(_RUNNING))

    def num_generated(self) -> int:
        """Tokens of all answers so far."""
        return int(self._sum(_GENERATED))

    def _sum(self, pattern: re.Pattern[str]) -> float:
        texts = [httpx.get(f"{url}/metrics", trust_env=False, timeout=30).text for url in self.servers]
        found = [float(value) for text in texts for value in pattern.findall(text)]
        assert len(found) >= len(texts), "the metrics of a server have other names"
        return sum(found)


class _Program:
    """A process whose output is in a file."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self._log = log
        file: IO[bytes]
        with log.open("wb") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            command = [sys.executable, "-m", "shoal.cli", *arguments]
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=_ROOT, env=environment)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _UP_SECONDS
        while not condition():
            ended = self.process.poll()
            assert ended is None and time.monotonic() < deadline, f"exit code {ended}:\n{self._log.read_text()}"
            time.sleep(0.05)

    def ask_to_end(self) -> None:
        self._children: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            self._children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()

    def end(self) -> None:
        """With all that it has started."""
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)
        for child in psutil.wait_procs(self._children, timeout=10)[1]:
            child.kill()


@contextlib.contextmanager
def targets(directory: Path) -> Iterator[dict[str, Target]]:
    """All of them, up. directory: for their logs."""
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as stopping:  # all are asked before one is waited for

        def start(name: str, *arguments: str) -> tuple[_Program, str]:
            port = free_port()
            program = _Program(directory / f"{name}.log", *arguments, "--port", str(port))
            stack.callback(program.end)
            stopping.callback(program.ask_to_end)
            return program, f"http://127.0.0.1:{port}"

        serving, shoal = start(
            "shoal", "serve", "shoal-tiny", "--device", "cpu", "--max-model-len", str(MAX_MODEL_LEN),
            "--served-model-name", MODEL, "--api-key", KEY, "--log-level", "warning",
        )  # fmt: skip
        fake = FakeProcess("foreign", tokens_per_second=200, max_model_len=MAX_MODEL_LEN, api_key=KEY)
        stack.callback(fake.end)
        behind = {"router-shoal": [shoal], "router-vllm": [fake.url], "router-mixed": [shoal, fake.url]}
        routers = {name: start(name, *_router(servers)) for name, servers in behind.items()}
        serving.until(lambda: _answers(f"{shoal}/health"))
        for name, (program, url) in routers.items():
            program.until(lambda url=url, name=name: _num_available(url) == len(behind[name]))
        urls = {"shoal": (shoal, [shoal]), "vllm": (fake.url, [fake.url])}
        urls |= {name: (url, behind[name]) for name, (_, url) in routers.items()}
        yield {name: Target(name, url, tuple(servers)) for name, (url, servers) in urls.items()}


def _router(servers: Sequence[str]) -> list[str]:
    arguments = ["router", "--api-key", KEY, "--backend-api-key", KEY, "--policy", "round-robin"]
    arguments += ["--probe-interval", "0.2", "--log-level", "warning"]
    # Two models never say the same: what a server has to say to enter is a matter of one model.
    arguments += ["--golden-prompt", "off"] if len(servers) > 1 else []
    return [*arguments, *(argument for url in servers for argument in ("--backend", url))]


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, trust_env=False).status_code == 200
    return False


def backends(url: str) -> list[dict[str, object]]:
    """What a router tells of its servers."""
    answer = httpx.get(f"{url}/router/backends", trust_env=False, timeout=10)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["backends"])


def _num_available(url: str) -> int:
    with contextlib.suppress(httpx.HTTPError):
        return sum(backend["available"] is True for backend in backends(url))
    return 0
