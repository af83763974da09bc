"""A Ray cluster of hosts, formed by the commands that users type, and engines that are served on it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.multihost.served import Server
from tests.namespaces import Host, Network, connected_hosts

_SHOAL = (sys.executable, "-m", "shoal.cli")


class RayCluster:
    """`hosts[0]` is the head. What is served there comes from `serve`."""

    def __init__(self, network: Network, directory: Path, num_cpus: int) -> None:
        self.network, self.hosts = network, network.hosts
        self._directory, self._num_cpus = directory, num_cpus
        self.servers: list[Server] = []

    def join(self, host: Host, **variables: str) -> str:
        """`shoal node start` there, on the first host with --head; what it prints."""
        head = self.hosts[0]
        if host is head:
            where = ["--head"]
        else:
            where = ["--address", f"{head.address}:6379"]
            variables["SHOAL_CLUSTER_TOKEN"] = (head.home / ".shoal" / "cluster-token").read_text().strip()
        command = [*_SHOAL, "node", "start", *where, "--num-cpus", str(self._num_cpus)]
        return host.run(*command, env={"OMP_NUM_THREADS": "1", **variables}, timeout=120)

    def serve(self, *options: str, **variables: str) -> Server:
        """`shoal serve` on the head, as somebody who set no variable for it but these."""
        log = self._directory / f"{len(self.servers)}.log"
        arguments = ["--port", "8000", "--distributed-executor-backend", "ray", *options]
        server = Server(self.hosts[0], log, arguments, {"OMP_NUM_THREADS": "1", **variables})
        self.servers.append(server)
        return server

    def outputs(self) -> str:
        return "\n".join(f"--- server {number}\n{server.output}" for number, server in enumerate(self.servers))

    def processes(self, host: Host, word: str) -> list[int]:
        """Those on a host whose command line has this word."""
        found = []
        for pid in host.pids():
            with contextlib.suppress(OSError):
                if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def workers(self, host: Host) -> list[int]:
        return self.processes(host, "shoal.worker")

    def left(self) -> list[int]:
        """What an engine should not leave behind: workers, actors, a core."""
        return [
            pid
            for host in self.hosts
            for word in ("shoal.worker", "ray::WorkerActor", "shoal.engine")
            for pid in self.processes(host, word)
        ]


@contextlib.contextmanager
def ray_cluster(
    num_hosts: int, directory: Path, *, num_cpus: int, variables: dict[int, Any] | None = None
) -> Iterator[RayCluster]:
    """A cluster that is up; at its end every node is stopped, and nothing is left on any host.

    variables: number of the host (from 0) -> what is set when its node is started.
    """
    with connected_hosts(num_hosts) as network:
        cluster = RayCluster(network, directory, num_cpus)
        try:
            for number, host in enumerate(network.hosts):
                cluster.join(host, **(variables or {}).get(number, {}))
            yield cluster
        except BaseException:
            print(cluster.outputs())  # pytest shows it with the failure
            raise
        for host in reversed(network.hosts):
            host.run(*_SHOAL, "node", "stop")
            host.wait_until_empty(0)


def environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if pair)
