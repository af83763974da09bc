"""Fake servers as processes of a test, a benchmark or the chaos harness: their start, their faults and their end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[3]


class FakeProcess:
    """A fake server. kind: "native" or "foreign". options: flags of the program, such as tokens_per_second=20."""

    def __init__(self, kind: str = "native", **options: Any) -> None:
        self.kind = kind
        self._options = options
        self.start()
        self.until_up()

    def start(self) -> None:
        """Start the program; after its end it comes back on the same ports."""
        options = {name.replace("_", "-"): value for name, value in self._options.items()}
        flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
        command = [sys.executable, "-m", f"tests.router.fakes.{self.kind}", *flags]
        # A home without a cluster's token: with one, servers would ask routers for the secret that is made from it.
        environment = {**os.environ, "HOME": str(ROOT / "tests")}
        environment.pop("SHOAL_CLUSTER_TOKEN", None)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment)

    def until_up(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the fake server ended with {self.process.wait()}"
        where = json.loads(line)
        self.port, self.control_port = where["port"], where["control_port"]
        self._options |= {"port": self.port, "control_port": self.control_port}
        self.url = f"http://127.0.0.1:{self.port}"

    def begin(self, kind: str, **details: Any) -> None:
        """Begin a fault, one of `faults.KINDS`."""
        self._control("POST", "/fault", {"kind": kind, **details})

    def heal(self) -> None:
        self._control("POST", "/heal", {})

    def state(self) -> dict[str, Any]:
        return dict(self._control("GET", "/state", None))

    def token_times(self) -> dict[str, list[float]]:
        """With records_times: when each request's tokens were made, by time.monotonic(), the same in all processes.
        The names are the engine's, which contain the client's x-request-id."""
        return dict(self._control("GET", "/times", None))

    def _control(self, method: str, path: str, content: Any) -> Any:
        url = f"http://127.0.0.1:{self.control_port}{path}"
        response = httpx.request(method, url, json=content, trust_env=False, timeout=10)
        assert response.status_code == 200, response.text
        return response.json()

    def end(self) -> None:
        """At once, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextlib.contextmanager
def fake_servers(*kinds: str, **options: Any) -> Iterator[list[FakeProcess]]:
    """One server for each kind, all with the same options."""
    servers: list[FakeProcess] = []
    try:
        for kind in kinds:
            servers.append(FakeProcess(kind, **options))
        yield servers
    finally:
        for server in servers:
            server.end()
