"""`shoal serve` on every host of a network of namespaces: what users type on two machines, run on one."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai

from shoal import LLM, SamplingParams
from tests.namespaces import Host, Network, connected_hosts

TOKEN = "a-token-that-all-hosts-have"
PROMPTS = ["你好，我想去成都玩几天。", "Sort these digits: 4 1 9 2"]
_UP_SECONDS = 120.0
_PORT = 8000


class Server:
    """`shoal serve` on one host. Its output goes to a file, so that nothing waits for a reader."""

    def __init__(self, host: Host, log: Path, arguments: Sequence[str], environment: dict[str, str]) -> None:
        self.host, self._log = host, log
        with log.open("w") as file:
            command = [sys.executable, "-m", "shoal.cli", "serve", *arguments]
            self.process: subprocess.Popen[Any] = host.popen(*command, env=environment, stdout=file, stderr=file)

    @property
    def output(self) -> str:
        return self._log.read_text()

    def until(self, pattern: str, timeout: float = _UP_SECONDS) -> None:
        """Wait until something like this is in the output."""
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.output):
            ended = self.process.poll()
            assert ended is None or re.search(pattern, self.output), f"ended with {ended}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {pattern!r} within {timeout} s:\n{self.output}"
            time.sleep(0.05)

    def exit_code(self, timeout: float) -> int:
        try:
            return int(self.process.wait(timeout))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.host.hostname} has not ended after {timeout} s:\n{self.output}") from None

    def worker(self) -> int:
        """The pid of one of the host's workers."""
        return self._pids("shoal.worker")[0]

    def core(self) -> int:
        return self._pids("shoal.engine")[0]

    def _pids(self, module: str) -> list[int]:
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in self.host.pids()}
        return [pid for pid, command in commands.items() if module.encode() in command]


class Cluster:
    """One server a host; `network.hosts[0]` is node 0."""

    def __init__(self, network: Network, directory: Path, options: Sequence[str]) -> None:
        self.network, self.hosts = network, network.hosts
        self._directory, self._options = directory, options
        self.servers: dict[int, Server] = {}

    def start(self, node_rank: int) -> Server:
        nodes = ["--nnodes", str(len(self.hosts)), "--node-rank", str(node_rank)]
        options = [option.replace("{home}", str(self.hosts[node_rank].home)) for option in self._options]
        arguments = ["--port", str(_PORT), *nodes, "--master-addr", self.hosts[0].address, *options]
        environment = {"SHOAL_CLUSTER_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
        server = Server(self.hosts[node_rank], self._directory / f"node{node_rank}.log", arguments, environment)
        self.servers[node_rank] = server
        return server

    def start_all(self) -> None:
        """Node 0 last: machines come in any order."""
        others = [self.start(node_rank) for node_rank in range(1, len(self.hosts))]
        for server in others:
            server.until("joins node 0")
        self.start(0)

    def until_up(self) -> None:
        self.servers[0].until("is served at")

    def client(self) -> contextlib.AbstractContextManager[openai.OpenAI]:
        """The official client, on node 0."""
        return client_on(self.hosts[0])

    def until_all_ended(self, timeout: float) -> list[int]:
        """Exit codes by node, when nothing is left on any host: not even a process that the servers have forgotten."""
        deadline = time.monotonic() + timeout
        servers = [server for _, server in sorted(self.servers.items())]
        codes = [server.exit_code(max(deadline - time.monotonic(), 0.1)) for server in servers]
        for host in self.hosts:
            host.wait_until_empty(max(deadline - time.monotonic(), 0.5))
        return codes

    def outputs(self) -> str:
        return "\n".join(f"--- {server.host.hostname}\n{server.output}" for server in self.servers.values())


@contextlib.contextmanager
def client_on(host: Host) -> Iterator[openai.OpenAI]:
    """The official client of what is served on a host, used there."""
    with (
        host.entered(),
        httpx.Client(trust_env=False, timeout=60.0) as http,
        openai.OpenAI(
            base_url=f"http://127.0.0.1:{_PORT}/v1", api_key="none", max_retries=0, http_client=http
        ) as client,
    ):
        yield client


@contextlib.contextmanager
def cluster(num_hosts: int, directory: Path, *options: str) -> Iterator[Cluster]:
    """Hosts on which nothing runs yet. options: the same for all nodes, but that {home} becomes each host's own."""
    with connected_hosts(num_hosts) as network:
        cluster = Cluster(network, directory, options)
        try:
            yield cluster
        except BaseException:
            print(cluster.outputs())  # pytest shows it with the failure
            raise


def complete(client: openai.OpenAI, prompt: str | list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy token ids, an answer for each prompt."""
    body = {"return_token_ids": True, "ignore_eos": True}
    model = client.models.list().data[0].id
    completion = client.completions.create(
        model=model, prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body=body
    )
    return [choice.token_ids for choice in completion.choices]  # type: ignore[attr-defined]


def tokens_of_one_process(prompts: Sequence[str], max_tokens: int, **options: Any) -> list[list[int]]:
    """What a single rank answers to the same requests."""
    with LLM(device="cpu", distributed_executor_backend="uni", **options) as llm:
        outputs = llm.generate(
            list(prompts), SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True), use_tqdm=False
        )
    return [list(output.outputs[0].token_ids) for output in outputs]
