"""All facts of this machine, the groups side by side."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

from shoal.cluster.doctor.facts import GpuFacts, ModelFacts, NodeFacts, VersionFacts
from shoal.cluster.doctor.gather.gpus import gather_gpus
from shoal.cluster.doctor.gather.model import gather_model
from shoal.cluster.doctor.gather.network import gather_network
from shoal.cluster.doctor.gather.ports import gather_ports
from shoal.cluster.doctor.gather.system import gather_container, gather_system
from shoal.cluster.doctor.gather.versions import gather_versions
from shoal.cluster.ports import NodePorts


def gather_node(
    *,
    head: str | None = None,
    address: str | None = None,
    is_head: bool = True,
    ports: NodePorts | None = None,
    model: str | None = None,
    load_torch: bool = True,
    ask_gpus: bool = True,
) -> NodeFacts:
    """head: HOST:PORT that this machine is, or is to be, in a cluster with. address: of the node that runs here.

    is_head: it would be, or is, the head, so that the head's ports count. load_torch: in a process of its own, to see
    whether it works. ask_gpus: run nvidia-smi. Both may take seconds.
    """
    with ThreadPoolExecutor(4) as pool:
        system = pool.submit(gather_system)
        network = pool.submit(gather_network, head, address)
        uses = pool.submit(gather_ports, ports or NodePorts(), is_head=is_head)
        found = pool.submit(_model, model)
        gpus, driver, driver_cuda = gather_gpus() if ask_gpus else (GpuFacts(), "", "")
        versions: VersionFacts = gather_versions(driver, driver_cuda, load=load_torch)
        way = network.result()
        return NodeFacts(
            hostname=socket.gethostname(),
            address=way.address,
            versions=versions,
            gpus=gpus,
            system=system.result(),
            network=way,
            ports=uses.result(),
            container=gather_container(way.interface),
            model=found.result(),
        )


def _model(name: str | None) -> ModelFacts | None:
    return gather_model(name) if name is not None else None
