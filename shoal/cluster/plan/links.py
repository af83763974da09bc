"""Links between devices: within a node by the card's table, between nodes by --node-link or as `shoal doctor` measured.

The doctor's file is `links.json` in Shoal's cache directory (`env.cache_directory()`):

    {"pairs": [{"from": "10.0.0.1", "to": "10.0.0.2", "bandwidth_bytes_per_s": 1.1e9, "round_trip_s": 0.0002}, …]}

`from` and `to` are nodes' addresses as the cluster names them; other keys are for other readers. Of several pairs the
slowest counts, since collectives wait for it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from shoal import env
from shoal.cluster.plan.devices import Device, Machine
from shoal.errors import ConfigError

FILE_NAME = "links.json"
DEFAULT_NODE_LINK = "10gbe"
# Name -> bandwidth in bytes/s, of which 92 % is reached; seconds from one end's program to the other's, one way.
_TCP = {"1gbe": 1.0, "10gbe": 10.0, "25gbe": 25.0, "40gbe": 40.0, "50gbe": 50.0, "100gbe": 100.0, "200gbe": 200.0}
_RDMA = {"25g-rdma": 25.0, "100g-rdma": 100.0, "200g-rdma": 200.0, "400g-rdma": 400.0}
_TCP_SECONDS, _SLOW_TCP_SECONDS, _RDMA_SECONDS = 30e-6, 60e-6, 5e-6
_REACHED = 0.92
# One TCP stream of NCCL is bound by a core: with the streams it opens, about this much comes through.
_TCP_MOST = 8e9
NODE_LINKS = (*_TCP, *_RDMA)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """bandwidth: bytes/s that are reached in one direction. latency: seconds of a message, one way.

    sum_latency: seconds that a sum over two ranks takes however small it is.
    """

    name: str
    bandwidth: float
    latency: float
    sum_latency: float
    is_measured: bool = False

    def all_reduce(self, num_bytes: float, num_ranks: int) -> float:
        """Seconds. Bytes as a ring moves them, latency as a tree has it."""
        if num_ranks == 1:
            return 0.0
        return self.sum_latency * max(1, math.ceil(math.log2(num_ranks)) / 2) + (
            2 * (num_ranks - 1) / num_ranks * num_bytes / self.bandwidth
        )

    def all_to_all(self, num_bytes: float, num_ranks: int) -> float:
        """Seconds; num_bytes: that one rank has for all."""
        if num_ranks == 1:
            return 0.0
        return self.sum_latency + (num_ranks - 1) / num_ranks * num_bytes / self.bandwidth

    def send(self, num_bytes: float) -> float:
        return self.latency + num_bytes / self.bandwidth


@dataclasses.dataclass(frozen=True, kw_only=True)
class Links:
    """inside: between devices of a node. between: between nodes."""

    inside: Link
    between: Link
    notes: tuple[str, ...] = ()


def links_of(machine: Machine, node_link: str | None, cache: Path | None = None) -> Links:
    """node_link: what is said counts; else what was measured counts; else 10 Gb Ethernet is assumed.

    Raises ConfigError for a link that is not known.
    """
    inside = inside_link(machine.device)
    if machine.num_nodes == 1:
        return Links(inside=inside, between=inside)
    is_cpu = machine.device.is_cpu
    if node_link is not None:
        return Links(inside=inside, between=node_link_of(node_link, is_cpu))
    path = (cache or env.cache_directory()) / FILE_NAME
    measured = read_measured(path, machine.names, is_cpu)
    if measured is not None:
        note = (
            f"between nodes {measured.bandwidth / 1e9:.2f} GB/s and {2e6 * measured.latency:.0f} µs there and back, as "
            f"shoal doctor measured ({path})"
        )
        return Links(inside=inside, between=measured, notes=(note,))
    note = f"between nodes {DEFAULT_NODE_LINK} is assumed; --node-link says otherwise"
    return Links(inside=inside, between=node_link_of(DEFAULT_NODE_LINK, is_cpu), notes=(note,))


def inside_link(device: Device) -> Link:
    """NVLink: sums in one kernel, 2.7 µs for two ranks, and 210 of 450 GB/s in large ones by NCCL (H100, measured).
    PCIe: no figure of our own; sums as a kernel across PCIe has them, 65 % of the link."""
    if device.is_cpu:
        return Link(name="shared memory", bandwidth=device.bandwidth / 4, latency=5e-6, sum_latency=20e-6)
    if device.nvlink:
        return Link(name="NVLink", bandwidth=device.nvlink * 0.47, latency=8e-6, sum_latency=3e-6)
    return Link(name="PCIe", bandwidth=device.pcie * 0.65, latency=12e-6, sum_latency=10e-6)


def node_link_of(name: str, is_cpu: bool) -> Link:
    """A link of the table. Raises ConfigError."""
    key = name.lower().replace("_", "-")
    if key in _TCP:
        seconds = _SLOW_TCP_SECONDS if key == "1gbe" else _TCP_SECONDS
        return _network(key, min(_TCP[key] / 8 * 1e9 * _REACHED, _TCP_MOST), seconds, is_cpu)
    if key in _RDMA:
        return _network(key, _RDMA[key] / 8 * 1e9 * _REACHED, _RDMA_SECONDS, is_cpu)
    raise ConfigError(f"--node-link {name!r} is not known; known: {', '.join(NODE_LINKS)}")


def _network(name: str, bandwidth: float, latency: float, is_cpu: bool, *, is_measured: bool = False) -> Link:
    # A sum over two ranks is a message each way at once, after what starts it: NCCL's kernels, or Gloo's threads.
    start = 100e-6 if is_cpu else 14e-6
    return Link(
        name=name, bandwidth=bandwidth, latency=latency, sum_latency=start + 2 * latency, is_measured=is_measured
    )


def read_measured(path: Path, names: Sequence[str], is_cpu: bool) -> Link | None:
    """The slowest of the pairs between these nodes (none named: of all pairs); None where nothing was measured.

    Raises ConfigError for a file that is not as it should be.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pairs = [
            (str(pair["from"]), str(pair["to"]), float(pair["bandwidth_bytes_per_s"]), float(pair["round_trip_s"]))
            for pair in content["pairs"]
        ]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not as shoal doctor writes it ({error!r}): run it again, remove the file, or give --node-link"
        ) from None
    if names:
        pairs = [pair for pair in pairs if pair[0] in names and pair[1] in names]
    pairs = [pair for pair in pairs if pair[0] != pair[1]]
    if not pairs:
        return None
    bandwidth, round_trip = min(pair[2] for pair in pairs), max(pair[3] for pair in pairs)
    if not bandwidth > 0 or not round_trip >= 0:
        raise ConfigError(
            f"{path}: bandwidth must be above 0 and round_trip_s at least 0; found {bandwidth}, {round_trip}"
        )
    return _network("measured", bandwidth, max(round_trip / 2, 5e-6), is_cpu, is_measured=True)
