"""One model over two hosts, over HTTP: row 1 of what Shoal is for, on the GPUs of one machine.

    python benchmarks/two_hosts.py [--tensor-parallel-size 2] [--preset gptq1] [--scale 1.0] [--json FILE]

Each host is a network namespace with an address of its own and half of the GPUs (all of a CPU); between them there is
a veth pair and nothing else, so that what crosses stages goes through sockets. Inside a host GPUs talk as they can.
`shoal serve --nnodes 2` runs on both with pipeline_parallel_size 2, `shoal bench serve` asks the first: one request
alone, then 64 at once. Random weights and token ids, end tokens ignored. Needs root; iproute2, or pyroute2 where there
is no `ip`.

vLLM 0.25.1, TP=4 × PP=2 on eight H200s in the same way: 8.8 ms/token alone (time of the whole request by its output
tokens), 4,880 output tok/s at 64.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoal.benchmark.presets import PRESETS

_PORT = 8009
_ADDRESSES = ("10.77.0.1", "10.77.0.2")
_ENTER = "import os, sys; from pyroute2 import netns; netns.setns(sys.argv[1]); os.execvp(sys.argv[2], sys.argv[2:])"
_RUNS = 3


class Hosts:
    """Two namespaces, joined. Usable as a context manager."""

    def __init__(self) -> None:
        self.names = [f"shoal-{os.getpid()}-{side}" for side in "ab"]
        self._has_ip = shutil.which("ip") is not None

    def __enter__(self) -> Hosts:
        links = [f"v{os.getpid() % 100000}{side}" for side in "ab"]
        if self._has_ip:
            for name in self.names:
                self._ip("netns", "add", name)
                self._ip("-n", name, "link", "set", "lo", "up")
            self._ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
            for name, link, address in zip(self.names, links, _ADDRESSES, strict=True):
                self._ip("link", "set", link, "netns", name)
                self._ip("-n", name, "link", "set", link, "name", "eth0")
                self._ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                self._ip("-n", name, "link", "set", "eth0", "up")
            return self
        pyroute2: Any = importlib.import_module("pyroute2")
        for name in self.names:
            pyroute2.netns.create(name)
        with pyroute2.IPRoute() as ip:
            ip.link("add", ifname=links[0], kind="veth", peer=links[1])
            for name, link in zip(self.names, links, strict=True):
                ip.link("set", index=ip.link_lookup(ifname=link)[0], net_ns_fd=name)
        for name, link, address in zip(self.names, links, _ADDRESSES, strict=True):
            with pyroute2.NetNS(name) as ip:
                ip.link("set", index=ip.link_lookup(ifname="lo")[0], state="up")
                index = ip.link_lookup(ifname=link)[0]
                ip.link("set", index=index, ifname="eth0")
                ip.addr("add", index=index, address=address, prefixlen=24)
                ip.link("set", index=index, state="up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            with contextlib.suppress(Exception):
                if self._has_ip:
                    self._ip("netns", "del", name)
                else:
                    importlib.import_module("pyroute2").netns.remove(name)

    def start(
        self, host: int, command: list[str], environment: dict[str, str], **options: Any
    ) -> subprocess.Popen[str]:
        name = self.names[host]
        enter = ["ip", "netns", "exec", name] if self._has_ip else [sys.executable, "-c", _ENTER, name]
        return subprocess.Popen(
            [*enter, *command], env={**os.environ, **environment}, text=True, start_new_session=True, **options
        )

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=2)
    parser.add_argument("--preset", default="gptq1", choices=sorted(PRESETS))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path, help="directory for what the servers say")
    parser.add_argument("--seconds", type=float, default=240.0, help="for the servers to come up")
    given = parser.parse_args()
    preset = PRESETS[given.preset] if given.scale == 1 else PRESETS[given.preset].scaled(given.scale)
    with tempfile.TemporaryDirectory() as directory, Hosts() as hosts:
        model, logs = Path(directory, "model"), given.logs or Path(directory)
        model.mkdir()
        logs.mkdir(parents=True, exist_ok=True)
        preset.shape.write(model)
        token = Path(directory, "token")
        token.write_text("0123456789abcdef" * 4)
        token.chmod(0o600)
        started = time.monotonic()
        with _servers(hosts, given, model, token, logs) as servers:
            _wait(hosts, servers, given.seconds, logs)
            startup = time.monotonic() - started
            alone = [_ask(hosts, given, preset.shape.vocab_size, 1, "128", 128) for _ in range(_RUNS)]
            many = [_ask(hosts, given, preset.shape.vocab_size, 64, "128-512", 256) for _ in range(_RUNS)]
    result = {
        "shape": preset.shape.name,
        "tensor_parallel_size": given.tensor_parallel_size,
        "pipeline_parallel_size": 2,
        "startup_seconds": round(startup, 1),
        "alone_ms_per_token": sorted(round(1e3 * run["seconds"] / run["tokens"], 2) for run in alone),
        "64_output_tokens_per_second": sorted(round(run["tokens"] / run["seconds"]) for run in many),
    }
    for name in ("alone_ms_per_token", "64_output_tokens_per_second"):
        print(f"{name}: median {statistics.median(result[name])} of {result[name]}")
    print(json.dumps(result))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2))
    return 0


@contextlib.contextmanager
def _servers(
    hosts: Hosts, given: argparse.Namespace, model: Path, token: Path, logs: Path
) -> Iterator[list[subprocess.Popen[str]]]:
    tensor = given.tensor_parallel_size
    servers, files = [], []
    try:
        for host in (1, 0):
            command = [
                sys.executable, "-m", "shoal.cli", "serve", str(model), "--load-format", "dummy",
                "--device", given.device,
                "--skip-tokenizer-init", "--port", str(_PORT), "--max-model-len", "4096", "--max-num-seqs", "64",
                "--tensor-parallel-size", str(tensor), "--pipeline-parallel-size", "2", "--no-enable-prefix-caching",
                "--nnodes", "2", "--node-rank", str(host), "--master-addr", _ADDRESSES[0], "--token-file", str(token),
            ]  # fmt: skip
            environment = {"NCCL_HOSTID": f"host-{host}", "SHOAL_HOST_IP": _ADDRESSES[host]}
            if given.device == "cuda":
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(host * tensor + index) for index in range(tensor))
            file = (logs / f"host-{host}.log").open("w")
            files.append(file)
            servers.append(hosts.start(host, command, environment, stdout=file, stderr=subprocess.STDOUT))
        yield servers
    finally:
        for server in servers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
        for server in servers:
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
        for file in files:
            file.close()


def _wait(hosts: Hosts, servers: list[subprocess.Popen[str]], seconds: float, logs: Path) -> None:
    ask = "import sys, urllib.request as u; sys.exit(u.urlopen(sys.argv[1], timeout=5).status != 200)"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(server.poll() is not None for server in servers):
            break
        command = [sys.executable, "-c", ask, f"http://127.0.0.1:{_PORT}/readyz"]
        if hosts.start(0, command, {}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait() == 0:
            return
        time.sleep(0.5)
    for host in (0, 1):
        print(f"--- host {host}\n" + "".join((logs / f"host-{host}.log").read_text().splitlines(keepends=True)[-25:]))
    raise SystemExit("the servers did not come up")


def _ask(
    hosts: Hosts, given: argparse.Namespace, vocab_size: int, num_requests: int, prompt: str, output: int
) -> dict[str, float]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [
            sys.executable, "-m", "shoal.cli", "bench", "serve", "--url", f"http://127.0.0.1:{_PORT}",
            "--requests", str(num_requests),
            "--concurrency", str(num_requests), "--prompt-tokens", prompt, "--output-tokens", str(output),
            "--vocab-size", str(vocab_size), "--warmup", str(min(num_requests, 8)), "--json", file.name,
        ]  # fmt: skip
        process = hosts.start(0, command, {}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said, _ = process.communicate(timeout=300)
        if process.returncode:
            raise SystemExit(said)
        report = json.loads(Path(file.name).read_text())["result"]
    assert report["num_succeeded"] == num_requests, report
    if num_requests == 1:
        return {"seconds": report["e2e_ms"]["mean"] / 1e3, "tokens": float(output)}
    return {"seconds": report["seconds"], "tokens": float(num_requests * output)}


if __name__ == "__main__":
    sys.exit(main())
