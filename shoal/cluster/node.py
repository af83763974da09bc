"""A node of a cluster on this machine: start it, see that it is up, end it. `shoal node` calls it.

A node is Ray's part (`ray_node`) and the node daemon (`daemon`), each in a session of its own; NodeRecord says what was
started, for whoever ends it.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from shoal import env, network
from shoal.cluster import join_check, processes, ray_node, reach
from shoal.cluster.daemon import client
from shoal.cluster.daemon.node_services import PING
from shoal.cluster.daemon.wire import Nothing
from shoal.cluster.ray_node import NodePlan, ports_of
from shoal.errors import NodeError, StartupError
from shoal.executor import ray_head
from shoal.network.node_record import (
    NodeRecord,
    boot_identity,
    read_record,
    remove_record,
    write_record,
)

_LOG = "daemon.log"
_DAEMON_UP_SECONDS = 20.0
_POLL_SECONDS = 0.1
# The daemon may have Ray's part to end that it has just begun.
_DAEMON_END_SECONDS = 20.0
_WATCH_SECONDS = 0.5
# A daemon that ends more often than so in so long has a reason that starting it again does not mend.
_NUM_DAEMONS, _DAEMONS_SECONDS = 5, 600.0


def start_node(plan: NodePlan) -> NodeRecord:
    """Start the node and return once the head's table shows it alive, and its daemon answers.

    Raises ConfigError (Ray is missing, an address is wrong), StartupError (a node runs here, a port is taken, the head
    does not answer, refuses the token or has other versions, ports between it and this machine are closed, the deadline
    has passed) or NodeError (what the head's daemon says); nothing is left then.
    """
    ray_head.check_installed()
    _refuse_second_node()
    address, head = _addresses(plan)
    ports = ports_of(head)
    if plan.dashboard:
        ray_node.check_dashboard()
    reach.refuse_taken(ports, address, is_head=plan.head is None, dashboard=plan.dashboard)
    if plan.head is not None:
        ray_head.check_versions(head, ray_head.ask_head(head, plan.token))
        join_check.check_ports(head, address, plan.token, ports)
    directory = tempfile.mkdtemp(prefix="shoal-ray-")
    ray_node.write_plan(plan, directory)
    starter = ray_node.start_ray(plan, address, head, directory)
    record = NodeRecord(head, address, plan.head is None, starter.pid, [], directory, boot_identity())
    try:
        write_record(record)
        record = _start_daemon(record, plan.token)
        ray_node.wait_for_ray(starter)
        record = ray_node.with_processes(record)
        ray_node.wait_until_listed(record, plan.token)
        _wait_for_daemon(record, plan.token)
        write_record(record)  # from here on the daemon keeps Ray's part up
    except BaseException:
        starter.kill()
        starter.communicate()
        end_node(ray_node.with_processes(record))
        raise
    return record


def stop_node() -> NodeRecord | None:
    """End the node of this machine, and all it runs. Returns what it was; None where there is none.

    Raises StartupError when a process survives (one that hangs in the kernel, or another user's).
    """
    record = read_record()
    if record is not None:
        end_node(record)
    return record


def end_node(record: NodeRecord) -> None:
    """The daemon first, which says goodbye, then Ray's part. Raises StartupError when a process survives."""
    if record.daemon is not None:
        # Whoever watches sees by that that the daemon does not end by itself.
        write_record(msgspec.structs.replace(record, daemon=None))
        daemon = processes.with_descendants([record.daemon])
        processes.send([record.daemon], signal.SIGTERM)
        if processes.wait_for_end([record.daemon], _DAEMON_END_SECONDS):
            processes.send([record.daemon], signal.SIGKILL)
        processes.send(daemon, signal.SIGKILL)
        ray_node.refuse_survivors(processes.wait_for_end(daemon, _DAEMON_END_SECONDS))
        # It may have started Ray's part again.
        latest = read_record()
        if latest is not None and latest.directory == record.directory:
            record = latest
    ray_node.end_ray(record)
    remove_record()
    shutil.rmtree(record.directory, ignore_errors=True)


def watch(token: str, say: Callable[[str], None]) -> None:
    """Until `shoal node stop` ends the node; `say` gets what its daemon writes down meanwhile.

    A daemon that ends by itself is started again. Raises StartupError when that does not help; the node is ended then.
    """
    record = read_record()
    if record is None:
        return
    directory, ends = record.directory, list[float]()
    with open(Path(directory) / _LOG, encoding="utf-8", errors="replace") as log:
        while (record := read_record()) is not None and record.directory == directory:
            while line := log.readline():
                say(line.rstrip("\n"))
            if record.daemon is not None and not processes.is_alive(record.daemon):
                now = time.monotonic()
                ends = [*(end for end in ends if now - end < _DAEMONS_SECONDS), now]
                if len(ends) >= _NUM_DAEMONS:
                    words = _last_words(directory)
                    end_node(record)
                    raise StartupError(f"the node's daemon has ended {len(ends)} times; its log ends with: {words}")
                say("the node's daemon has ended by itself; it is started again")
                _start_daemon(record, token)
            time.sleep(_WATCH_SECONDS)


def revive_daemon(token: str) -> bool:
    """Start the daemon of this machine's node again where it has ended by itself. Whether there still is a node."""
    record = read_record()
    if record is None or record.daemon is None:
        return False
    if not processes.is_alive(record.daemon):
        _start_daemon(record, token)
    return True


def join_command(record: NodeRecord, token: str) -> str:
    """What to type on the other machines, complete."""
    return f"SHOAL_CLUSTER_TOKEN={token} shoal node start --address {record.head}"


def daemon_endpoint(head: str, address: str) -> str:
    """HOST:PORT of the daemon of the node `address` in the cluster of HOST:PORT `head`."""
    return network.format_endpoint(address, ports_of(head).daemon)


def _start_daemon(record: NodeRecord, token: str) -> NodeRecord:
    """The record with the daemon in it, as it is written."""
    environment = env.subprocess_environment({"SHOAL_CLUSTER_TOKEN": token})
    with open(Path(record.directory) / _LOG, "ab") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "shoal.cluster.daemon", record.directory],
            env=environment,
            cwd=record.directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    process = processes.identify(daemon.pid)
    if process is None:
        raise StartupError(f"the node's daemon ended at once: {_last_words(record.directory)}")
    record = msgspec.structs.replace(record, daemon=process)
    write_record(record)
    return record


def _wait_for_daemon(record: NodeRecord, token: str) -> None:
    endpoint, deadline = daemon_endpoint(record.head, record.address), time.monotonic() + _DAEMON_UP_SECONDS
    while True:
        if record.daemon is None or not processes.is_alive(record.daemon):
            raise StartupError(f"the node's daemon ended while it came up: {_last_words(record.directory)}")
        try:
            client.ask(endpoint, token, PING, Nothing(), timeout=_DAEMON_UP_SECONDS)
            return
        except NodeError as error:
            if error.reason not in ("refused", "silent") or time.monotonic() >= deadline:
                raise
            time.sleep(_POLL_SECONDS)


def _last_words(directory: str) -> str:
    try:
        return ray_node.gist((Path(directory) / _LOG).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "nothing"


def runs(record: NodeRecord) -> bool:
    """Whether anything of the node is alive."""
    return bool(processes.alive([*record.processes, *filter(None, [record.daemon])]))


def _refuse_second_node() -> None:
    record = read_record()
    if record is None:
        return
    has_daemon = record.daemon is not None and processes.is_alive(record.daemon)
    if runs(record):
        raise StartupError(
            f"a node of the cluster {record.head} runs on this machine already ({record.address}"
            f"{'' if has_daemon else '; its daemon has ended'}); `shoal node stop` ends it"
        )
    end_node(record)  # it died; what it left goes


def _addresses(plan: NodePlan) -> tuple[str, str]:
    """Of this node, and HOST:PORT of the head, by address."""
    if plan.node_ip is not None:
        network.interface_of(plan.node_ip)
    if plan.head is None:
        address = plan.node_ip or network.host_address()
        return address, network.format_endpoint(address, plan.port)
    host, port = network.split_endpoint(plan.head, ray_head.DEFAULT_PORT)
    target = network.resolve_head(host)
    return plan.node_ip or network.host_address(target), network.format_endpoint(target, port)
