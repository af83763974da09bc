"""Joining a Ray cluster from a node of it: which one, with which token, under which address. RayLauncher and the
deployments of shoal.cluster use it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from shoal import env, network
from shoal.errors import ConfigError, StartupError
from shoal.executor import ray_head
from shoal.log import get_logger
from shoal.network.node_record import read_record

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
    """HOST:PORT of the heads that Ray processes of this machine belong to. Raises StartupError.

    Another process looks: Ray, once loaded here, would take no notice of the token that `join` sets.
    """
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, env=env.subprocess_environment(), capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise StartupError(f"cannot look for Ray clusters on this machine: {said[-1]}")
    return set(json.loads(done.stdout))


def _main() -> int:
    try:
        with ray_head.private_names():
            from ray._private.services import find_gcs_addresses
    except StartupError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(sorted(find_gcs_addresses())))
    return 0


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


if __name__ == "__main__":
    sys.exit(_main())
