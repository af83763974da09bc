"""Joining a Ray cluster from a node of it: which one, with which token, under which address. RayLauncher and the
deployments of shoal.cluster use it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import psutil

from shoal import env, network
from shoal.errors import ConfigError, StartupError
from shoal.executor import ray_head
from shoal.log import get_logger
from shoal.network.node_record import read_record

_HEAD_FLAG = "--gcs-address="

logger = get_logger(__name__)


def find_token(head: str, token_file: str | None) -> str | None:
    """None for a cluster that somebody else started: what Ray needs then is in Ray's own variables and files."""
    record = read_record()
    is_ours = record is not None and record.head == head
    if token_file is None and not is_ours and env.has_ray_authentication():
        return None
    try:
        return network.load_token(token_file)
    except ConfigError:
        if is_ours or token_file is not None or env.cluster_token() is not None:
            raise
        return None


def own_address(head: str, answer: ray_head.Answer) -> str:
    """Of the node of the cluster that this machine is. Raises StartupError where it is none."""
    alive = {node.address for node in answer.nodes if node.alive}
    record = read_record()
    if record is not None and record.address in alive:
        return record.address
    for interface in network.interfaces():
        if interface.address in alive:
            return interface.address
    raise StartupError(
        f"this machine ({network.format_interfaces()}) is no node of the cluster {head}, whose nodes are "
        f"{', '.join(sorted(alive)) or 'gone'}; `shoal node start --address {head}` makes it one"
    )


def join(head: str, token: str | None, address: str, *, namespace: str) -> None:
    """This process is a driver of the cluster from now on, until `ray.shutdown`. address: of this node."""
    variables = ray_head.ray_variables(token) if token else {}
    for name, value in variables.items():
        env.set_default(name, value)
    # Not before: Ray reads its variables when it is loaded.
    import ray

    host, port = network.split_endpoint(head)
    endpoint = network.format_endpoint(network.resolve_head(host), port)
    with _own_signals(), translated(f"cannot join the cluster {head}"):
        ray.init(
            address=endpoint,
            namespace=namespace,
            log_to_driver=False,
            logging_level="error",
            _node_ip_address=address,
        )
    # Ray writes what happens to actors to standard output, whatever the log level; that is told otherwise here.
    try:
        with ray_head.private_names():
            from ray._private.worker import print_to_stdstream  # noqa: F401  setting it alone would not tell

            ray._private.worker.print_to_stdstream = _log_what_ray_says
    except StartupError:
        ray.shutdown()
        raise


def clusters_here() -> set[str]:
    """HOST:PORT of the heads that Ray processes of this machine belong to; those of another network namespace do not
    count, as each of these is a machine of its own.

    As Ray itself does it, but without loading it: once loaded, it takes no notice of the token that `join` sets.
    """
    found: set[str] = set()
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or [""]
        if os.path.basename(command[0]) == "raylet" and _shares_network(process.pid):
            words = " ".join(command).split()
            found.update(word.removeprefix(_HEAD_FLAG) for word in words if word.startswith(_HEAD_FLAG))
    return found


def _shares_network(pid: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
    except PermissionError:
        return True  # another user's
    except OSError:
        return False  # it has just ended


def _log_what_ray_says(data: dict[str, Any], ignore_prefix: bool) -> None:
    for line in data["lines"]:
        logger.debug("Ray: %s", line)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray sets handlers of its own for the signals that this process has decided about."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Ray's errors, and those it passes on from an actor, as StartupError."""
    import ray

    try:
        yield
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise StartupError(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
