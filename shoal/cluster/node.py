"""A node of a cluster on this machine: start it, see that it is up, end it. `shoal node` calls it.

A node is what `ray start` brings up, in a session of its own; NodeRecord says what that was, for whoever ends it.
"""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import psutil

from shoal import env, network
from shoal.cluster import processes
from shoal.errors import StartupError
from shoal.executor import ray_head
from shoal.network.node_record import (
    NodeRecord,
    ProcessRecord,
    boot_identity,
    read_record,
    remove_record,
    write_record,
)

START_SECONDS = 60.0
_UP_SECONDS = 20.0
# By then the head has found out that it cannot reach a node (see _HEALTH_CHECKS), and lists it as dead.
_REACHED_SECONDS = 8.0
_RAYLET_SECONDS = 5.0
_REST_SECONDS = 5.0
_KILLED_SECONDS = 5.0
_WATCH_SECONDS = 0.5
# `shoal node stop` removes the record so soon after the first process ends; who only died leaves it.
_STOPPED_SECONDS = 3.0
_SMALLEST_STORE = 128 << 20
_LARGEST_STORE = 2 << 30
# A node that is gone is noticed after 3 to 4 seconds, where Ray's own figures make that a minute. One that is cut off
# from its head, which has given it up by then, ends its actors after half a minute; else it would keep them.
_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodePlan:
    """What to start. head: HOST:PORT of the cluster to join; None: this node is the head, on `port`.

    node_ip: address of this node, None: chosen. num_cpus, num_gpus: None as found. resources: JSON, for Ray.
    """

    head: str | None
    token: str
    port: int = ray_head.DEFAULT_PORT
    node_ip: str | None = None
    num_cpus: int | None = None
    num_gpus: int | None = None
    resources: str | None = None


def start_node(plan: NodePlan) -> NodeRecord:
    """Start the node and return once the head's table shows it alive.

    Raises ConfigError (Ray is missing, an address is wrong) or StartupError (a node runs here, the port is taken, the
    head does not answer, refuses the token or has other versions, the deadline has passed); nothing is left then.
    """
    ray_head.check_installed()
    _refuse_second_node()
    address, head = _addresses(plan)
    if plan.head is None:
        # The listener is closed again at once: Ray opens the port itself.
        network.listen(address, plan.port, way_out="choose another with --port").close()
    else:
        ray_head.check_versions(head, ray_head.ask_head(head, plan.token))
    directory = tempfile.mkdtemp(prefix="shoal-ray-")
    starter = _run_ray_start(plan, address, head, directory)
    record = NodeRecord(head, address, plan.head is None, starter.pid, [], directory, boot_identity())
    try:
        write_record(record)
        _wait_for_starter(starter)
        record = _with_processes(record)
        write_record(record)
        _wait_until_up(record, plan.token)
    except BaseException:
        starter.kill()
        starter.communicate()
        end_node(_with_processes(record))
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
    """The raylet first, which ends its workers and tells the head; then the others; what is left is killed."""
    everything = processes.with_descendants(_members(record))
    raylets = [process for process in everything if _is_raylet(process)]
    processes.send(raylets, signal.SIGTERM)
    processes.wait_for_end(raylets, _RAYLET_SECONDS)
    processes.send(everything, signal.SIGTERM)
    everything += processes.with_descendants(_members(record))  # what came up meanwhile
    processes.send(processes.wait_for_end(everything, _REST_SECONDS), signal.SIGKILL)
    if left := processes.wait_for_end(everything, _KILLED_SECONDS):
        raise StartupError(f"these processes of the node could not be ended: {', '.join(str(p.pid) for p in left)}")
    remove_record()
    shutil.rmtree(record.directory, ignore_errors=True)


def is_up(record: NodeRecord) -> bool:
    """Whether the processes without which the node is none still run."""
    return len(processes.alive(record.processes)) == len(record.processes)


def _members(record: NodeRecord) -> list[ProcessRecord]:
    """The session's processes, if it still is the node's: one that was recorded lives, or one names its directory.

    A session keeps its number for as long as any of its processes lives; so one of them vouches for all.
    """
    session = [entry.process for entry in processes.in_session(record.session)]
    ours = processes.alive(record.processes) or any(record.directory in processes.command_line(p) for p in session)
    return session if ours else []


def _with_processes(record: NodeRecord) -> NodeRecord:
    """The record with what belongs to a node for as long as it is up; workers come and go."""
    lasting = [
        entry.process for entry in processes.in_session(record.session) if entry.name in ("raylet", "gcs_server")
    ]
    return msgspec.structs.replace(record, processes=lasting)


def _is_raylet(process: ProcessRecord) -> bool:
    entry = processes.table().get(process.pid)
    return entry is not None and entry.name == "raylet"


def _refuse_second_node() -> None:
    record = read_record()
    if record is None:
        return
    if processes.alive(record.processes):
        raise StartupError(
            f"a node of the cluster {record.head} runs on this machine already ({record.address}); "
            "`shoal node stop` ends it"
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


def _run_ray_start(plan: NodePlan, address: str, head: str, directory: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--node-ip-address", address]
    if plan.head is None:
        command += ["--head", "--port", str(plan.port), "--include-dashboard", "false", "--no-monitor"]
    else:
        command += ["--address", head]
    command += ["--temp-dir", directory, "--disable-usage-stats", "--object-store-memory", str(_store_bytes())]
    for flag, value in (("--num-cpus", plan.num_cpus), ("--num-gpus", plan.num_gpus), ("--resources", plan.resources)):
        if value is not None:
            command += [flag, str(value)]
    variables = {**_HEALTH_CHECKS, **ray_head.ray_variables(plan.token)}
    # Workers get the devices of all ranks of their engine on this node, not just one's own.
    variables["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    if plan.node_ip is not None:
        variables["SHOAL_HOST_IP"] = plan.node_ip
    environment = env.subprocess_environment(variables)
    environment.pop("RAY_ADDRESS", None)  # it would have Ray join that cluster
    return subprocess.Popen(
        command,
        env=environment,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _wait_for_starter(starter: subprocess.Popen[bytes]) -> None:
    try:
        output, _ = starter.communicate(timeout=START_SECONDS)
    except subprocess.TimeoutExpired as error:
        text = (error.output or b"").decode(errors="replace")
        raise StartupError(f"Ray did not start within {START_SECONDS:g} s; it said: {_gist(text)}") from None
    if starter.returncode != 0:
        raise StartupError(f"Ray did not start: {_gist(output.decode(errors='replace'))}")


def _gist(output: str) -> str:
    """The last line that says something: of a traceback, the error."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and set(line.strip()) != {"-"}]
    return lines[-1] if lines else "nothing"


def _last_words(directory: str) -> str:
    """The ends of the logs of the raylet and of the head's server."""
    logs = [*Path(directory).glob("session_latest/logs/raylet.*"), *Path(directory).glob("session_latest/logs/gcs_*.*")]
    ends = [_gist(log.read_text(encoding="utf-8", errors="replace")) for log in logs if log.stat().st_size]
    return " | ".join(ends) or "nothing"


def _wait_until_up(record: NodeRecord, token: str) -> None:
    """Until the head's table shows this address alive; a node that was here before may still stand there as dead.

    Where the address was chosen against the route to the head, also until the head has reached the node by it.
    """
    head = network.split_endpoint(record.head)[0]
    settle = 0.0 if record.is_head or network.sends_from(record.address, head) else _REACHED_SECONDS
    deadline = time.monotonic() + _UP_SECONDS
    alive_since: float | None = None
    while True:
        if not record.processes or not is_up(record):
            if alive_since is not None:  # it ends itself when it hears that it is dead
                raise StartupError(_not_reached(record))
            raise StartupError(f"the node ended while it came up; Ray's logs end with: {_last_words(record.directory)}")
        answer = ray_head.ask_head(record.head, token)
        now = time.monotonic()
        if any(node.alive and node.address == record.address for node in answer.nodes):
            alive_since = alive_since or now
            if now - alive_since >= settle:
                return
        elif alive_since is not None or now >= deadline:
            raise StartupError(_not_reached(record))


def _not_reached(record: NodeRecord) -> str:
    return (
        f"the node runs, but the head at {record.head} does not reach it at {record.address}. Is that the right one of "
        "this machine's addresses (--node-ip, SHOAL_HOST_IP, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME choose), and do "
        f"firewalls let the head connect to it? This machine has: {network.format_interfaces()}"
    )


def _store_bytes() -> int:
    """Of Ray's object store, where Shoal itself puts nothing: a hundredth of the memory, 128 MiB to 2 GiB."""
    return max(_SMALLEST_STORE, min(_LARGEST_STORE, psutil.virtual_memory().total // 100))


def watch(record: NodeRecord) -> None:
    """Until `shoal node stop` ends the node. Raises StartupError when it ends by itself; what is left is ended then."""
    while is_up(record):
        time.sleep(_WATCH_SECONDS)
    deadline = time.monotonic() + _STOPPED_SECONDS
    while time.monotonic() < deadline:
        if read_record() != record:
            return
        time.sleep(_WATCH_SECONDS)
    end_node(record)
    raise StartupError("the node has ended by itself: a process of Ray is gone, or the head is")


def join_command(record: NodeRecord, token: str) -> str:
    """What to type on the other machines, complete."""
    return f"SHOAL_CLUSTER_TOKEN={token} shoal node start --address {record.head}"
