"""Launcher: brings the worker processes of one engine up, sees them end, and ends them. DistributedExecutor uses one.

It knows nothing of steps: those go between the executor's hub and the workers themselves.
"""

from __future__ import annotations

import abc
import dataclasses
import sys
from collections.abc import Callable

# Called from any thread: the rank, and how its process ended ("was killed by signal 9").
OnExit = Callable[[int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerLink:
    """What a worker process is told when it starts: where the hub listens, and the token that opens the connection.

    endpoint: a ZeroMQ endpoint. token: the cluster's; for children on one host, one that the hub made.
    model_path: of the model on the worker's host, where that is another one than the core's; None: as the core has it.
    """

    endpoint: str
    generation: int
    token: str
    model_path: str | None = None

    def command(self, rank: int) -> list[str]:
        """The worker's command line. The token goes in as the first line of standard input, seen by nobody else; the
        end of standard input ends the worker."""
        arguments = ["--link", self.endpoint, "--rank", str(rank), "--generation", str(self.generation)]
        if self.model_path is not None:
            arguments += ["--model-path", self.model_path]
        return [sys.executable, "-m", "shoal.worker", *arguments]


class Launcher(abc.ABC):
    """One for each way of placing ranks: subprocesses of this host, a Ray cluster, the nodes of --nnodes."""

    @abc.abstractmethod
    def listen_address(self) -> str | None:
        """The address of this host on which the hub listens for the workers; None: all are children here.

        Raises StartupError when there is no cluster, or none of its resources are enough.
        """

    @abc.abstractmethod
    def token(self) -> str | None:
        """The cluster's token; None: all are children here, which the hub makes one for. Raises ConfigError without."""

    @abc.abstractmethod
    def start(self, link: WorkerLink, on_exit: OnExit) -> None:
        """Start the process of every rank; returns when they have been started, before they say hello.

        Raises StartupError. `on_exit` is called once for each process that ends, until `stop` is called.
        """

    @abc.abstractmethod
    def describe(self, rank: int) -> str:
        """How to call a rank that has not said hello yet: "rank 3 (on node-b, 10.0.0.4)"."""

    def device_index(self, rank: int, local_rank: int) -> int:
        """Which of the CUDA devices that its process sees a rank takes; local_rank: among this engine's ranks there."""
        return local_rank

    def num_sharing(self, local_size: int) -> int:
        """How many ranks, those of other replicas counted, share a host that has `local_size` of this engine's."""
        return local_size

    def tell(self, reason: str) -> None:  # noqa: B027
        """The engine has failed, and why: for the other hosts to know. Comes before `stop`, from any thread."""

    def abandon(self) -> None:  # noqa: B027
        """See `Executor.abandon`: for launchers whose other hosts would take this process's end for a failure."""

    @abc.abstractmethod
    def stop(self, grace_seconds: float) -> None:
        """Wait so long for the processes to end by themselves, then end them by force; return when none is left.

        May be called twice, and at any time, also while `start` failed half-way.
        """


def describe_exit(returncode: int) -> str:
    """How a process ended, in words."""
    if returncode >= 0:
        return f"ended with exit code {returncode}; its own output says more"
    hint = "; the kernel may have ended it for want of memory" if returncode == -9 else ""
    return f"was killed by signal {-returncode}{hint}"
