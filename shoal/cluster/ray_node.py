"""Ray's part of a node: `ray start` with the ports, health checks and token of the cluster, and its end.

`node` starts it with a node; the node's daemon starts it again after it has ended, or after the head has given it up.
"""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import psutil

from shoal import env, network
from shoal.cluster import processes
from shoal.cluster.ports import NodePorts
from shoal.errors import ConfigError, StartupError
from shoal.executor import ray_head
from shoal.network.node_record import NodeRecord, ProcessRecord

START_SECONDS = 60.0
UP_SECONDS = 20.0
_POLL_SECONDS = 0.1
_RAYLET_SECONDS = 5.0
_REST_SECONDS = 5.0
_KILLED_SECONDS = 5.0
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
_LASTING = ("raylet", "gcs_server")
_PLAN_FILE = "plan.json"


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
    dashboard: bool = False


def write_plan(plan: NodePlan, directory: str) -> None:
    """For the daemon. Without the token, which no file but the user's own holds."""
    path = Path(directory) / _PLAN_FILE
    path.write_bytes(msgspec.json.encode(dataclasses.replace(plan, token="")))


def read_plan(directory: str, token: str) -> NodePlan:
    plan = msgspec.json.decode((Path(directory) / _PLAN_FILE).read_bytes(), type=NodePlan)
    return dataclasses.replace(plan, token=token)


def ports_of(head: str) -> NodePorts:
    """Of the cluster whose head is at HOST:PORT."""
    return NodePorts(network.split_endpoint(head)[1])


def check_dashboard() -> None:
    """Raises ConfigError where Ray is installed without what its dashboard needs."""
    code = "import ray.dashboard.optional_deps"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=START_SECONDS)
    if done.returncode != 0:
        raise ConfigError(
            f"Ray's dashboard needs packages that are not installed here ({gist(done.stderr)}): pip install "
            f"'ray[default]=={ray_head.TESTED_RAY}.*', or leave --dashboard out"
        )


def start_ray(plan: NodePlan, address: str, head: str, directory: str) -> subprocess.Popen[bytes]:
    """Begin: `ray start` in a session of its own, which all that it starts stays in. `wait_for_ray` sees its end."""
    ports = ports_of(head)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--node-ip-address", address]
    if plan.head is None:
        command += ["--head", "--port", str(ports.head), "--no-monitor"]
        command += ["--include-dashboard", str(plan.dashboard).lower(), "--dashboard-port", str(ports.dashboard)]
    else:
        command += ["--address", head]
    command += ["--temp-dir", directory, "--disable-usage-stats", "--object-store-memory", str(_store_bytes())]
    for flag, value in (
        ("--node-manager-port", ports.node_manager),
        ("--object-manager-port", ports.object_manager),
        ("--metrics-export-port", ports.metrics_export),
        ("--dashboard-agent-grpc-port", ports.dashboard_agent),
        ("--dashboard-agent-listen-port", ports.dashboard_agent_http),
        ("--runtime-env-agent-port", ports.runtime_env_agent),
        ("--min-worker-port", ports.workers[0]),
        ("--max-worker-port", ports.workers[1]),
        ("--num-cpus", plan.num_cpus),
        ("--num-gpus", plan.num_gpus),
        ("--resources", plan.resources),
    ):
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


def wait_for_ray(starter: subprocess.Popen[bytes]) -> None:
    """Until `ray start` has ended well. Raises StartupError with what it said otherwise."""
    try:
        output, _ = starter.communicate(timeout=START_SECONDS)
    except subprocess.TimeoutExpired as error:
        text = (error.output or b"").decode(errors="replace")
        raise StartupError(f"Ray did not start within {START_SECONDS:g} s; it said: {gist(text)}") from None
    if starter.returncode != 0:
        raise StartupError(f"Ray did not start: {gist(output.decode(errors='replace'))}")


def wait_until_listed(record: NodeRecord, token: str, *, is_unwanted: Callable[[], bool] = lambda: False) -> None:
    """Until the head's table shows this address alive; a node that was here before may still stand there as dead.

    Raises StartupError: the node has ended, or the head does not list it in time. is_unwanted: whether to stop waiting.
    """
    deadline = time.monotonic() + UP_SECONDS
    while not is_unwanted():
        if not is_up(record):
            raise StartupError(f"the node ended while it came up; Ray's logs end with: {last_words(record.directory)}")
        answer = ray_head.ask_head(record.head, token)
        if any(node.alive and node.address == record.address for node in answer.nodes):
            return
        if time.monotonic() >= deadline:
            raise StartupError(not_reached(record.head, record.address))
        time.sleep(_POLL_SECONDS)


def not_reached(head: str, address: str) -> str:
    return (
        f"the node runs, but the head at {head} does not reach it at {address}. Is that the right one of "
        "this machine's addresses (--node-ip, SHOAL_HOST_IP, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME choose), and do "
        f"firewalls let the head connect to it? This machine has: {network.format_interfaces()}"
    )


def with_processes(record: NodeRecord) -> NodeRecord:
    """The record with what belongs to a node for as long as it is up; workers come and go."""
    lasting = [entry.process for entry in processes.in_session(record.session) if entry.name in _LASTING]
    return msgspec.structs.replace(record, processes=lasting)


def is_up(record: NodeRecord) -> bool:
    """Whether the processes without which the node is none still run."""
    return bool(record.processes) and len(processes.alive(record.processes)) == len(record.processes)


def end_ray(record: NodeRecord) -> None:
    """The raylet first, which ends its workers and tells the head; then the others; what is left is killed.

    Raises StartupError when a process survives (one that hangs in the kernel, or another user's).
    """
    everything = processes.with_descendants(_members(record))
    raylets = [process for process in everything if _is_raylet(process)]
    processes.send(raylets, signal.SIGTERM)
    processes.wait_for_end(raylets, _RAYLET_SECONDS)
    processes.send(everything, signal.SIGTERM)
    everything += processes.with_descendants(_members(record))  # what came up meanwhile
    processes.send(processes.wait_for_end(everything, _REST_SECONDS), signal.SIGKILL)
    refuse_survivors(processes.wait_for_end(everything, _KILLED_SECONDS))


def refuse_survivors(left: Iterable[ProcessRecord]) -> None:
    if names := ", ".join(str(process.pid) for process in left):
        raise StartupError(f"these processes of the node could not be ended: {names}")


def last_words(directory: str) -> str:
    """The ends of the logs of the raylet and of the head's server."""
    logs = [*Path(directory).glob("session_latest/logs/raylet.*"), *Path(directory).glob("session_latest/logs/gcs_*.*")]
    ends = [gist(log.read_text(encoding="utf-8", errors="replace")) for log in logs if log.stat().st_size]
    return " | ".join(ends) or "nothing"


def gist(output: str) -> str:
    """The last line that says something: of a traceback, the error."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and set(line.strip()) != {"-"}]
    return lines[-1] if lines else "nothing"


def _members(record: NodeRecord) -> list[ProcessRecord]:
    """The session's processes, if it still is the node's: one that was recorded lives, or one names its directory.

    A session keeps its number for as long as any of its processes lives; so one of them vouches for all.
    """
    session = [entry.process for entry in processes.in_session(record.session)]
    ours = processes.alive(record.processes) or any(record.directory in processes.command_line(p) for p in session)
    return session if ours else []


def _is_raylet(process: ProcessRecord) -> bool:
    entry = processes.table().get(process.pid)
    return entry is not None and entry.name == "raylet"


def _store_bytes() -> int:
    """Of Ray's object store, where Shoal itself puts nothing: a hundredth of the memory, 128 MiB to 2 GiB."""
    return max(_SMALLEST_STORE, min(_LARGEST_STORE, psutil.virtual_memory().total // 100))
