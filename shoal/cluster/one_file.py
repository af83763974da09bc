"""A cluster from one file: each machine finds itself in the list of `nodes:`, and takes its place.

The first machine holds the engine and serves; the others work for it, and answer on their own port through a router
before it. `shoal serve` calls it. Without Ray `executor/node_agent.py` brings the machines together and ends them
together; with it, `file_node`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from shoal import env, network
from shoal.cluster.deploy.keeper import ends_with_this_process
from shoal.config.options import ModelOptions, ParallelOptions, ServerOptions
from shoal.errors import ConfigError
from shoal.log import get_logger

_INFINIBAND = Path("/sys/class/infiniband")
_GPUS = Path("/proc/driver/nvidia/gpus")
_END_SECONDS = 10.0

logger = get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Machine:
    """One entry of the list. addresses: what its host leads to on this machine; none where a name does not resolve."""

    host: str
    port: int
    addresses: tuple[str, ...]

    def __str__(self) -> str:
        found = ", ".join(self.addresses) or "does not resolve here"
        return self.host if found == self.host else f"{self.host} ({found})"


@dataclasses.dataclass(frozen=True)
class Place:
    """This machine in the list. address: the one of its own by which the list has it. head: HOST:PORT that serves."""

    rank: int
    address: str
    port: int
    head: str
    machines: tuple[Machine, ...]

    @property
    def num_machines(self) -> int:
        return len(self.machines)


def take_place(
    model: ModelOptions, parallel: ParallelOptions, server: ServerOptions
) -> tuple[ParallelOptions, ServerOptions, Place]:
    """The options that this machine's part is started with, and its place.

    Without a degree, stages go over the machines and tensor parallelism over the GPUs of each. Sets the variables by
    which libraries choose the interface and the transport, where they are not set. Raises ConfigError.
    """
    if parallel.nnodes > 1 or parallel.node_rank or parallel.master_addr is not None:
        raise ConfigError("nodes says what nnodes, node_rank and master_addr say; give one of the two")
    machines = [_machine(text, server.port) for text in parallel.nodes]
    place = find_place(machines)
    _choose_transport(parallel, place)
    degrees = (parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.data_parallel_size)
    tensor, pipeline, data = degrees
    if degrees == (1, 1, 1) and len(machines) > 1:
        tensor, pipeline = max(1, _num_gpus(model.device)), len(machines)
        logger.info(
            "%d machines and no degree given: --tensor-parallel-size %d --pipeline-parallel-size %d",
            len(machines), tensor, pipeline,
        )  # fmt: skip
    parallel = dataclasses.replace(
        parallel, nodes=[], tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, data_parallel_size=data
    )
    if len(machines) > 1 and parallel.distributed_executor_backend != "ray":
        master = place.address if place.rank == 0 else machines[0].host
        parallel = dataclasses.replace(parallel, nnodes=len(machines), node_rank=place.rank, master_addr=master)
    host = place.address if server.host == ServerOptions.host else server.host
    server = dataclasses.replace(server, host=host, port=place.port)
    logger.info("this machine is %s, number %d of %d", place.address, place.rank + 1, place.num_machines)
    return parallel, server, place


def find_place(machines: Sequence[Machine]) -> Place:
    """Which of the machines this one is, by its addresses. Raises ConfigError for none, several, or one named twice."""
    seen: dict[tuple[str, ...], int] = {}
    for index, machine in enumerate(machines):
        if machine.addresses and seen.setdefault(machine.addresses, index) != index:
            raise ConfigError(f"nodes[{seen[machine.addresses]}] and nodes[{index}] are the same machine, {machine}")
    interfaces = network.interfaces()
    own = {interface.address for interface in interfaces if not interface.is_loopback}
    if len(machines) == 1:
        own |= {address for address in machines[0].addresses if network.is_loopback(address)}
    found = [
        (index, address) for index, machine in enumerate(machines) for address in machine.addresses if address in own
    ]
    ranks = sorted({index for index, _ in found})
    if len(ranks) > 1:
        raise ConfigError(
            f"nodes[{ranks[0]}], {machines[ranks[0]]}, and nodes[{ranks[1]}], {machines[ranks[1]]}, are both this "
            "machine"
        )
    if not ranks:
        loops = [f"{each.host} leads to {each.addresses[0]} here, which is no address of this machine for the others"
                 for each in machines if each.addresses and network.is_loopback(each.addresses[0])]  # fmt: skip
        raise ConfigError(
            f"this machine ({network.format_interfaces()}) is none of nodes: {', '.join(map(str, machines))}"
            + (f". {loops[0]} (look in /etc/hosts): write the address" if loops else "")
        )
    rank, address = found[0]
    head = machines[0]
    host = address if rank == 0 else (head.addresses[0] if head.addresses else head.host)
    return Place(rank, address, machines[rank].port, network.format_endpoint(host, head.port), tuple(machines))


@contextlib.contextmanager
def entrance(place: Place, server: ServerOptions) -> Iterator[None]:
    """The OpenAI API on the port of a machine that does not hold the engine: a router before the one that does."""
    url = f"{'https' if server.ssl_certfile else 'http'}://{place.head}"
    command = [
        sys.executable, "-m", "shoal.cli", "router", f"--host={server.host}", f"--port={place.port}",
        f"--backend={url}", f"--log-level={server.log_level}",
    ]  # fmt: skip
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        if value := getattr(server, name):
            command.append(f"--{name.replace('_', '-')}={value}")
    variables = {}
    keys = server.api_key or ([key] if (key := env.api_key()) else [])
    if keys:  # not for everyone's eyes in the list of processes
        variables = {"SHOAL_API_KEY": json.dumps(keys), "SHOAL_BACKEND_API_KEY": keys[0]}
    router = subprocess.Popen(
        ends_with_this_process(command), env=env.subprocess_environment(variables), stdin=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        router.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            router.wait(_END_SECONDS)
        router.kill()
        router.wait()


def _machine(text: str, default_port: int) -> Machine:
    host, port = network.split_endpoint(text, default_port)
    with contextlib.suppress(ValueError):
        return Machine(host, port, (str(ipaddress.ip_address(host)),))
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        return Machine(host, port, ())
    addresses = dict.fromkeys(str(entry[4][0]) for entry in found)
    return Machine(host, port, tuple(sorted(addresses, key=lambda address: ":" in address)))


def _choose_transport(parallel: ParallelOptions, place: Place) -> None:
    interface = parallel.communication_interface
    if interface is not None:
        names = {each.name for each in network.interfaces()}
        if interface not in names:
            raise ConfigError(
                f"communication_interface {interface} is none of this machine's: {network.format_interfaces()}"
            )
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
            env.set_default(name, interface)
    elif place.num_machines > 1 and env.host_ip() is None:
        env.set_default("SHOAL_HOST_IP", place.address)
    if parallel.communication_protocol == "tcp":
        env.set_default("NCCL_IB_DISABLE", "1")
    elif parallel.communication_protocol == "rdma":
        states = [path.read_text().strip() for path in _INFINIBAND.glob("*/ports/*/state")]
        if not any("ACTIVE" in state for state in states):
            seen = ", ".join(states) or f"nothing in {_INFINIBAND}"
            raise ConfigError(
                f"communication_protocol rdma needs an active InfiniBand or RoCE port, and this machine has {seen}; "
                "tcp works everywhere, auto takes what there is"
            )
        env.set_default("NCCL_IB_DISABLE", "0")


def _num_gpus(device: str) -> int:
    if device == "cpu":
        return 0
    visible = env.cuda_visible_devices()
    return len(visible) if visible is not None else len(list(_GPUS.glob("*")))
