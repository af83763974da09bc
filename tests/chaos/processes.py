"""The processes of a chaos run: replicas, fake or real, and the router. Known by HTTP, pids and metrics alone."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import httpx
import psutil

from shoal.network import free_port
from tests.chaos.client import Door
from tests.chaos.link import Link

ROOT = Path(__file__).parents[2]
NUM_RANKS = 2  # of a real replica
_KV_USAGE = re.compile(r"^\w+:kv_cache_usage_perc\S* (\S+)$", re.MULTILINE)
_RUNNING = re.compile(r"^\w+:num_requests_(?:running|waiting)\S* (\S+)$", re.MULTILINE)
_ROUTER_METRIC = re.compile(r"^shoal_router:(\w+)(?:\{.*\})? (\S+)$", re.MULTILINE)
# Faults that follow each other within seconds are no loop of a broken engine: none counts a second later.
RESTARTS = ("--max-engine-restarts", "100", "--engine-restart-window", "1")
# One that is told to end hands its requests on after so many seconds, those that are not through by then.
IMPATIENT = ("--shutdown-timeout", "0.3")
# Requests with a key are kept so long after their client went: short, so that the end of a run can wait for it.
KEPT_SECONDS = 15.0


class Program:
    """A process with its output in a file. environment: what marks all processes of the run."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.name, self._command, self._log_path, self._environment = name, command, log, environment
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log: IO[bytes] = open(self._log_path, "ab")  # noqa: SIM115 - the process's own from here on
        with log:
            environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **self._environment}
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def psutil(self) -> psutil.Process:
        assert self.process is not None
        return psutil.Process(self.process.pid)

    def descendants(self, module: str = "") -> list[psutil.Process]:
        """Children and theirs, of which the command line names `module`."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self.psutil().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    if not module or module in child.cmdline():
                        found.append(child)
        return found

    def kill_all(self) -> None:
        """The process and all its descendants at once, as when a machine fails."""
        assert self.process is not None
        victims = self.descendants()
        self.process.kill()
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        self.process.wait(20)

    def terminate(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    async def until_ended(self, timeout: float) -> int:
        assert self.process is not None
        deadline = time.monotonic() + timeout
        while (code := self.process.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} did not end within {timeout:g} s:\n{self.output[-3000:]}")
            await asyncio.sleep(0.02)
        return code

    async def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for one in (self.psutil(), *self.descendants()):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.resume()
            self.terminate()
            try:
                await self.until_ended(20)
            except TimeoutError:
                self.kill_all()

    async def until(self, condition: Callable[[], bool], timeout: float, otherwise: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} {otherwise} within {timeout:g} s")
            await asyncio.sleep(0.01)

    async def until_answers(self, url: str, timeout: float) -> None:
        """Wait for 200 at this address."""
        deadline = time.monotonic() + timeout
        async with httpx.AsyncClient(verify=False, trust_env=False, timeout=2) as http:
            while True:
                assert self.process is not None
                if (code := self.process.poll()) is not None:
                    raise RuntimeError(f"{self.name} ended with {code}:\n{self.output[-3000:]}")
                with contextlib.suppress(httpx.HTTPError):
                    if (await http.get(url)).status_code == 200:
                        return
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.name} is not up after {timeout:g} s:\n{self.output[-3000:]}")
                await asyncio.sleep(0.05)


class Replica(Program, abc.ABC):
    """A server behind a link. url: its own address; the router is given the link's. flags: more of its program."""

    model = ""
    start_seconds = 30.0

    def __init__(self, name: str, directory: Path, environment: dict[str, str], *flags: str) -> None:
        self.flags = flags
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.link = Link(self.port)
        super().__init__(name, self.command(), directory / f"{name}.log", environment)

    @abc.abstractmethod
    def command(self) -> list[str]:
        """What starts it."""

    async def until_up(self) -> None:
        await self.until_answers(f"{self.url}/readyz", self.start_seconds)

    @abc.abstractmethod
    async def break_engine(self, rng: Any, *, core: bool) -> None:
        """SIGKILL a worker, or the core."""

    @abc.abstractmethod
    async def stop_engine(self, rng: Any) -> None:
        """Have the engine make no step any more, without that it ends."""

    @abc.abstractmethod
    async def mend_engine(self) -> None:
        """Undo `stop_engine` where nobody did so far."""

    async def metrics(self) -> str:
        async with httpx.AsyncClient(verify=False, trust_env=False, timeout=5) as http:
            return (await http.get(f"{self.url}/metrics")).text

    async def in_use(self) -> list[str]:
        """What of requests is left in the engine: nothing, once all have ended."""
        try:
            text = await self.metrics()
        except httpx.HTTPError as error:
            return [f"{self.name} tells nothing of its engine: {type(error).__name__}"]
        usage, running = [[float(value) for value in pattern.findall(text)] for pattern in (_KV_USAGE, _RUNNING)]
        if not usage or not running:
            return [f"{self.name} has no metrics of its KV cache and requests"]
        left = [f"{self.name}: {max(usage):.4%} of the KV cache in use"] if max(usage) else []
        return left + ([f"{self.name}: {sum(running):g} requests run or wait"] if sum(running) else [])


class FakeReplica(Replica):
    """No model and no children: the loss of a worker or a core is told to it."""

    model = "fake"

    def __init__(
        self,
        name: str,
        directory: Path,
        environment: dict[str, str],
        *flags: str,
        pace: float = 50.0,
        kind: str = "native",
    ) -> None:
        self.control_port = free_port()
        self._pace, self._kind = pace, kind
        super().__init__(name, directory, environment, *flags)

    def command(self) -> list[str]:
        program = [sys.executable, "-m", f"tests.router.fakes.{self._kind}", "--port", str(self.port)]
        return [
            *program, "--control-port", str(self.control_port), "--tokens-per-second", str(self._pace),
            "--log-level", "info", *RESTARTS, *self.flags,
        ]  # fmt: skip

    async def until_up(self) -> None:
        await self.until_answers(f"{self.url}/health", self.start_seconds)

    async def break_engine(self, rng: Any, *, core: bool) -> None:
        await self._control("/fault", {"kind": "lost"})

    async def stop_engine(self, rng: Any) -> None:
        await self._control("/fault", {"kind": "freeze"})

    async def mend_engine(self) -> None:
        await self._control("/heal", {})

    async def _control(self, path: str, content: dict[str, Any]) -> None:
        async with httpx.AsyncClient(verify=False, trust_env=False, timeout=10) as http:
            (await http.post(f"http://127.0.0.1:{self.control_port}{path}", json=content)).raise_for_status()


class RealReplica(Replica):
    """shoal-tiny with two ranks on the CPU, in the deterministic mode."""

    model = "shoal-tiny"
    start_seconds = 180.0

    def command(self) -> list[str]:
        return [
            sys.executable, "-m", "shoal.cli.main", "serve", "shoal-tiny", "--device", "cpu", "-tp", str(NUM_RANKS),
            "--port", str(self.port), "--max-model-len", "512", "--max-num-seqs", "64", "--startup-timeout", "120",
            "--disable-log-requests", "--kv-cache-memory", "64MiB", *RESTARTS, *self.flags,
        ]  # fmt: skip

    def workers(self) -> list[psutil.Process]:
        return self.descendants("shoal.worker")

    async def in_use(self) -> list[str]:
        """Of requests, and of engines that came before the last restart."""
        left = await super().in_use()
        for module, wanted in (("shoal.engine", 1), ("shoal.worker", NUM_RANKS)):
            if (found := len(self.descendants(module))) != wanted:
                left.append(f"{self.name} has {found} processes of {module}, and should have {wanted}")
        return left

    async def break_engine(self, rng: Any, *, core: bool) -> None:
        victims = self.descendants("shoal.engine") if core else self.workers()
        assert victims, f"{self.name} has no {'core' if core else 'worker'}: {self.output[-2000:]}"
        rng.choice(victims).kill()

    async def stop_engine(self, rng: Any) -> None:
        rng.choice(self.workers()).suspend()

    async def mend_engine(self) -> None:
        for worker in self.workers():
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.resume()


class Router(Program):
    """`shoal router` in front of replicas' links. peer_ports: of the others, which it tells of requests with a key."""

    def __init__(
        self,
        name: str,
        port: int,
        peer_ports: Sequence[int],
        replicas: Sequence[Replica],
        directory: Path,
        environment: dict[str, str],
        *flags: str,
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.door = Door(self.url)
        backends = [argument for replica in replicas for argument in ("--backend", replica.link.url)]
        peers = [argument for other in peer_ports for argument in ("--peer", f"http://127.0.0.1:{other}")]
        program = [sys.executable, "-m", "shoal.cli.main", "router"]
        kept = ["--resume-seconds", str(KEPT_SECONDS)]
        command = [*program, "--port", str(port), *backends, *peers, *kept, *flags]
        super().__init__(name, command, directory / f"{name}.log", environment)

    async def until_up(self) -> None:
        await self.until_answers(f"{self.url}/health", 60)

    async def until_peers_know(self) -> None:
        """The other routers can be told of requests, and were told of all that there are."""
        deadline, num_good = time.monotonic() + 60, 0
        while num_good < 2:
            metrics = await self.metrics()
            good = (
                all(metrics.get("peer_up", ())) and max(metrics.get("replication_lag_seconds", ()), default=0.0) < 0.5
            )
            num_good = num_good + 1 if good else 0
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} cannot tell its peers of requests:\n{self.output[-3000:]}")
            await asyncio.sleep(0.1)

    async def drain(self, replica: Replica, *, back: bool = False) -> None:
        """What `shoal router drain URL` asks for, or its undoing."""
        verb = "undrain" if back else "drain"
        async with httpx.AsyncClient(verify=False, trust_env=False, timeout=10) as http:
            response = await http.post(f"{self.url}/router/{verb}", json={"url": replica.link.url})
        if response.status_code != 200:
            raise RuntimeError(f"{verb} of {replica.name}: status {response.status_code}: {response.text}")

    async def metrics(self) -> Mapping[str, list[float]]:
        """The values of each metric, whatever their labels."""
        async with httpx.AsyncClient(verify=False, trust_env=False, timeout=5) as http:
            text = (await http.get(f"{self.url}/metrics")).text
        values: dict[str, list[float]] = {}
        for name, value in _ROUTER_METRIC.findall(text):
            values.setdefault(name, []).append(float(value))
        return values

    async def in_use(self) -> list[str]:
        """What of requests is left in the router: nothing, once all have ended and their time to be kept is over."""
        try:
            metrics = await self.metrics()
        except httpx.HTTPError as error:
            return [f"{self.name} tells nothing: {type(error).__name__}"]
        counts = ("backend_requests_running", "backend_outstanding_tokens", "num_requests_waiting")
        left = []
        for name in (*counts, "kept_requests", "kept_bytes"):
            if name not in metrics:
                left.append(f"{self.name} has no metric {name}")
            elif total := sum(metrics[name]):
                left.append(f"{self.name}: {name} is {total:g}")
        return left
