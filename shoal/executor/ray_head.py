"""What the head of a Ray cluster says: its versions and its nodes. Node commands and the Ray launcher ask it.

The question is put by a short process of its own (this module run as a program), so that it ends in time whatever Ray
does, and Ray's own messages stay out of ours.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from shoal import env, network
from shoal.errors import ConfigError, StartupError

DEFAULT_PORT = 6379
TESTED_RAY = "2.60"
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 20.0
# Ray itself ends every process of a cluster a minute after its head is gone, without a word that names it.
HEAD_GONE_SECONDS = 10.0
_LOOK_SECONDS = 1.0
_FOLLOW_SECONDS = 0.3


class Node(msgspec.Struct):
    """A node as the head knows it. resources: what it has in all: "CPU", "GPU" and others. free: what is left of it."""

    node_id: str
    address: str
    hostname: str
    alive: bool
    is_head: bool
    resources: dict[str, float]
    free: dict[str, float] = {}


class Answer(msgspec.Struct):
    """What the asking process prints. refused: the token is wrong or missing. Versions are of the cluster."""

    ray_version: str = ""
    python_version: str = ""
    nodes: list[Node] = []
    refused: bool = False


def check_installed() -> None:
    """Raises ConfigError where Ray is not."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("Ray is not installed here; pip install 'shoal[ray]' brings it")


@contextlib.contextmanager
def private_names() -> Iterator[None]:
    """For what Ray has no public name for: raises StartupError where this version of Ray lacks that."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        installed = importlib.metadata.version("ray")
        raise StartupError(
            f"Ray {installed} is installed here, and lacks what Shoal uses of Ray {TESTED_RAY}, with which "
            f"it is tested ({error}): pip install 'ray=={TESTED_RAY}.*' on every node"
        ) from error


def ray_variables(token: str) -> dict[str, str]:
    """Environment for Ray's own processes: its token authentication (Ray 2.52 and later) gets the cluster's token."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}


def ask_head(head: str, token: str | None) -> Answer:
    """What the head at HOST:PORT says; token None: as the environment has it (a cluster that Shoal did not start).

    Raises StartupError: not reachable, no Ray cluster, or the token is refused.
    """
    host, port = network.split_endpoint(head, DEFAULT_PORT)
    endpoint = network.format_endpoint(network.resolve_head(host), port)
    _check_reachable(head, endpoint)
    variables = {"RAY_BACKEND_LOG_LEVEL": "fatal", **(ray_variables(token) if token else {})}
    command = [sys.executable, "-m", "shoal.executor.ray_head", endpoint]
    try:
        done = subprocess.run(
            command, env=env.subprocess_environment(variables), capture_output=True, timeout=_ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise StartupError(
            f"{head} takes connections but did not answer within {_ANSWER_SECONDS:g} s: it is no head of a Ray "
            "cluster, or it hangs"
        ) from error
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise StartupError(f"cannot ask the head at {head}: {lines[-1]}")
    answer = decode_answer(done.stdout.splitlines()[-1])
    if answer.refused:
        raise StartupError(
            f"the head at {head} refuses the cluster token given here. It must be the head's: copy the file "
            f"{network.default_token_path()} from there, or use the command that `shoal node start --head` printed"
        )
    return answer


def check_versions(head: str, answer: Answer) -> None:
    """Raise StartupError where Ray or Python differ from the cluster's: Ray's nodes would not understand each other."""
    for what, theirs, ours in (
        ("Ray", answer.ray_version, importlib.metadata.version("ray")),
        ("Python", answer.python_version, platform.python_version()),
    ):
        if theirs != ours:
            raise StartupError(
                f"{what} {ours} is here, and the cluster of {head} has {what} {theirs}; every node must have the same"
            )


def _check_reachable(head: str, endpoint: str) -> None:
    host, port = network.split_endpoint(endpoint)
    try:
        network.connect(host, port, timeout=_CONNECT_SECONDS).close()
        return
    except ConnectionRefusedError as error:
        reason: Exception = error
        text = f"nothing listens there. Is the head up (`shoal node start --head` on it), and is {port} its port?"
    except TimeoutError as error:
        reason = error
        text = f"no answer within {_CONNECT_SECONDS:g} s. Is the address right, and does a firewall keep port {port}?"
    except OSError as error:
        reason = error
        text = f"{error.strerror or error}. This machine has: {network.format_interfaces()}"
    raise StartupError(f"cannot reach the head at {head}: {text}") from reason


class HeadWatch:
    """Looks each second whether the head still takes connections, which costs it nothing, from a thread of its own."""

    def __init__(self, head: str, endpoint: str, on_gone: Callable[[str], None]) -> None:
        """on_gone: called once, with what was seen, when the head has taken no connection for HEAD_GONE_SECONDS."""
        self._head, self._endpoint, self._on_gone = head, endpoint, on_gone
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray-head-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more. From any thread, also from `on_gone`."""
        self._stopping.set()

    def _watch(self) -> None:
        last_seen = time.monotonic()
        while not self._stopping.wait(_LOOK_SECONDS):
            try:
                _check_reachable(self._head, self._endpoint)
                last_seen = time.monotonic()
            except StartupError as error:
                if time.monotonic() - last_seen >= HEAD_GONE_SECONDS:
                    if not self._stopping.is_set():
                        self._on_gone(str(error))
                    return


def follow_head(endpoint: str, token: str) -> subprocess.Popen[bytes]:
    """A process that prints what the head at ADDRESS:PORT says, an Answer a line (`decode_answer`), again and again.

    It ends when the head says nothing more, and with this process.
    """
    variables = {"RAY_BACKEND_LOG_LEVEL": "fatal", **ray_variables(token)}
    command = [sys.executable, "-m", "shoal.executor.ray_head", endpoint, str(os.getpid())]
    return subprocess.Popen(
        command, env=env.subprocess_environment(variables), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def decode_answer(line: bytes) -> Answer:
    return msgspec.json.decode(line, type=Answer)


def _main(endpoint: str, follower: int | None = None) -> int:
    """The asking process. GcsClient is what `ray start` itself asks with; a whole driver would take seconds.

    follower: the process for which to go on.
    """
    try:
        with private_names():
            from ray._raylet import GcsClient  # type: ignore[attr-defined]
            from ray.exceptions import AuthenticationError
    except StartupError as error:
        print(error, file=sys.stderr)
        return 1

    try:
        client = GcsClient(address=endpoint)
        metadata = client.internal_kv_get(b"CLUSTER_METADATA", b"cluster", timeout=_ANSWER_SECONDS)
        deadline = time.monotonic() + _CONNECT_SECONDS
        while metadata is None and time.monotonic() < deadline:  # the head writes it after it begins to listen
            time.sleep(0.1)
            metadata = client.internal_kv_get(b"CLUSTER_METADATA", b"cluster", timeout=_ANSWER_SECONDS)
        _print_answer(client, metadata)
        while follower == os.getppid():
            time.sleep(_FOLLOW_SECONDS)
            _print_answer(client, metadata)
    except AuthenticationError:
        print(msgspec.json.encode(Answer(refused=True)).decode())
    return 0


def _print_answer(client: Any, metadata: bytes | None) -> None:
    infos = client.get_all_node_info(timeout=_ANSWER_SECONDS).values()
    usage = client.get_all_resource_usage(timeout=_ANSWER_SECONDS).resource_usage_data.batch
    versions = msgspec.json.decode(metadata or b"{}")
    free = {each.node_id: dict(each.resources_available) for each in usage}
    nodes = [
        Node(
            node_id=info.node_id.hex(),
            address=info.node_manager_address,
            hostname=info.node_manager_hostname,
            alive=info.state == 0,  # GcsNodeInfo.ALIVE
            is_head=info.is_head_node,
            resources=dict(info.resources_total),
            free=free.get(info.node_id, {}),
        )
        for info in infos
    ]
    answer = Answer(versions.get("ray_version", ""), versions.get("python_version", ""), nodes)
    print(msgspec.json.encode(answer).decode(), flush=True)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], int(sys.argv[2]) if sys.argv[2:] else None))
