"""A deployment on a host of its own, load for it, and a look at what it says. Tests of `shoal deploy` use it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.namespaces import Host, connected_hosts

PORT = 9100
_SHOAL = (sys.executable, "-m", "shoal.cli", "deploy")


class Deployed:
    """`directory`: temporary files of all that runs on the host. `others`: more hosts, on which nothing runs yet."""

    def __init__(self, host: Host, directory: Path, others: Sequence[Host] = ()) -> None:
        self.host, self.directory, self.others = host, directory, others
        self.environment = {"OMP_NUM_THREADS": "1", "TMPDIR": str(directory)}
        self.url = f"http://127.0.0.1:{PORT}"

    def start_nodes(self) -> None:
        """A cluster of all hosts, with the first as its head."""
        start = (sys.executable, "-m", "shoal.cli", "node", "start", "--num-cpus", "4")
        self.host.run(*start, "--head", env=self.environment)
        for host in self.others:
            environment = self.environment_on(host)
            Path(environment["TMPDIR"]).mkdir()
            host.run(*start, "--address", f"{self.host.address}:6379", env=environment)

    def environment_on(self, host: Host) -> dict[str, str]:
        """Of a command on one of the others."""
        token = (self.host.home / ".shoal" / "cluster-token").read_text().strip()
        directory = self.directory.parent / f"o{self.others.index(host)}"
        return {**self.environment, "TMPDIR": str(directory), "SHOAL_CLUSTER_TOKEN": token}

    def shoal(self, *arguments: str, fails: bool = False) -> str:
        """What `shoal deploy …` prints; with `fails`, also its error."""
        try:
            said = self.host.run(*_SHOAL, *arguments, env=self.environment, timeout=120)
        except AssertionError as error:
            if not fails:
                raise
            return str(error)
        assert not fails, said
        return said

    def file(self, **fields: Any) -> str:
        """A deployment of one model, 1 to 3 replicas that come and go quickly."""
        model = {
            "name": "fake",
            "model": "fake",
            "replicas": {"min": 1, "max": 3},
            "layout": {"num_cpus": 0.1},
            "serve": {"device": "cpu", "max_num_seqs": 4},
            "scale": {"target_queue": 1, "up_after": 0.5, "down_after": 1},
            **fields,
        }
        path = self.directory.parent / f"{self.directory.name}.yaml"
        path.write_text(yaml.safe_dump({"models": [model], "router": {"port": PORT, "probe_interval": 0.2}}))
        return str(path)

    def deploy_fake(self, file: str, on: Host | None = None) -> None:
        """`shoal deploy` with the fake server as program, which stays that of the deployment. on: one of the others."""
        environment = self.environment if on is None else self.environment_on(on)
        program = (sys.executable, "-m", "tests.cluster.deploy_program")
        (on or self.host).run(*program, file, env=environment, timeout=120)

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.shoal("status", "--json")))

    def serving(self) -> set[str]:
        """URLs of the servers that the router sends requests to."""
        with self.host.entered():
            answer = httpx.get(f"{self.url}/router/backends", trust_env=False)
        return {backend["url"] for backend in answer.json()["backends"] if backend["available"]}

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"it did not happen: {json.dumps(self.status(), indent=1)}"
            time.sleep(0.2)


class Load(threading.Thread):
    """`num_clients` at a time ask for streamed answers, again and again; `failures` says what went wrong."""

    def __init__(self, deployed: Deployed, num_clients: int, num_tokens: int = 30) -> None:
        super().__init__(name="load")
        self._deployed, self.num_clients, self._num_tokens = deployed, num_clients, num_tokens
        self.num_done = 0
        self.failures: list[str] = []
        self._ending = threading.Event()

    def run(self) -> None:
        with self._deployed.host.entered():
            asyncio.run(self._run())

    def stop(self) -> None:
        """Those that run finish."""
        self._ending.set()
        self.join()

    def end(self) -> None:
        self.stop()
        assert not self.failures, self.failures[:5]
        assert self.num_done

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=60, trust_env=False, limits=limits) as client:
            tasks: set[asyncio.Task[None]] = set()
            while not self._ending.is_set():
                while len(tasks) < self.num_clients:
                    tasks.add(asyncio.create_task(self._request(client)))
                await asyncio.sleep(0.02)
                tasks = {task for task in tasks if not task.done()}
            await asyncio.gather(*tasks)

    async def _request(self, client: httpx.AsyncClient) -> None:
        body = {"model": "fake", "prompt": "Hello", "max_tokens": self._num_tokens, "stream": True}
        body |= {"ignore_eos": True, "return_token_ids": True}
        ids: list[int] = []
        ended = False
        try:
            async with client.stream("POST", f"{self._deployed.url}/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    self.failures.append(f"{answer.status_code} {(await answer.aread())!r}")
                    return
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        ended = True
                    elif line.startswith("data: "):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            self.failures.append(line)
                        for choice in event.get("choices", []):
                            ids += choice.get("token_ids") or []
        except httpx.HTTPError as error:
            self.failures.append(repr(error))
            return
        if not ended or len(ids) != self._num_tokens:
            self.failures.append(f"ended: {ended}, {len(ids)} of {self._num_tokens} tokens")
        self.num_done += 1


@contextlib.contextmanager
def deployment(num_hosts: int = 1) -> Iterator[Deployed]:
    """Hosts where nothing runs yet; at the end neither a process nor a file of a deployment is left on the first."""
    # Short: Ray's sockets lie deep in it, with 107 bytes a path.
    with tempfile.TemporaryDirectory(prefix="d-", dir="/tmp") as directory, connected_hosts(num_hosts) as network:
        (Path(directory) / "t").mkdir()
        deployed = Deployed(network.hosts[0], Path(directory) / "t", network.hosts[1:])
        try:
            yield deployed
        except BaseException:
            for log in Path(directory).glob("t/shoal-ray-*/session_latest/logs/worker*.err"):
                print(f"--- {log.name}\n{log.read_text()}")
            raise
        deployed.shoal("stop")
        deployed.host.wait_until_empty(5)
        left = [str(path) for path in deployed.directory.rglob("*")]
        assert not left, left
